"""Tables of numbers: one row per sample, a target column, features everywhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchlin.data.base import ArrayDataModule, Arrays, Resident, SplitName
from torchlin.data.errors import DataError
from torchlin.data.table_files import Table, read_table
from torchlin.registry import nearest

_INTEGER = re.compile(r"[+-]?[0-9]+")


class FeaturesDataModule(ArrayDataModule):
    """Features and class labels from a file: a table, or the cached output of a frozen network.

    `.npz` and `.safetensors` hold an array `features` (samples, features) and one `target` (samples,). `.csv`
    (a header line, then numbers) and `.parquet` hold a column `target`, all other columns being features. The
    classes are the distinct target values in order: by size if all are integers, otherwise alphabetically.

    Args:
        path: the file to train on.
        target: name of the column or array that holds the class labels (integers or names).
        test_path: a file of the same form to test on; None for no test split.
        batch_size: samples per step of the optimizer, over all processes.
        num_workers: processes that load batches; 0 is fastest for data in memory.
        seed: decides the order of training samples and which of them become validation samples.
        val_fraction: share of the training samples held out for validation, in [0, 1); 0 for none.
        resident: see `ImageFolderDataModule`.

    Attributes:
        feature_names: the feature columns' names in order; None for `.npz` and `.safetensors`.

    Raises:
        DataError: a file is missing, of another form, or holds a value that is no finite number (named by row
            and column); a test file with other columns or with a class that the training file lacks.
    """

    def __init__(
        self,
        path: str,
        target: str = "target",
        test_path: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        resident: Resident = "auto",
    ) -> None:
        source = Path(path).expanduser()
        train = read_table(source, target)
        integers, class_names = _classes(train.labels)
        if len(class_names) < 2:
            raise DataError(
                f"{source}: target {target!r} holds only {class_names[0]!r}; at least two classes are needed"
            )
        tables: dict[SplitName, Arrays] = {
            "train": Arrays(train.features, _encoded(train.labels, class_names, integers, source))
        }
        if test_path is not None:
            test_source = Path(test_path).expanduser()
            test = read_table(test_source, target)
            _check_same_columns(train, test, test_source)
            tables["test"] = Arrays(test.features, _encoded(test.labels, class_names, integers, test_source))
        super().__init__(
            name=source.stem,
            class_names=class_names,
            input_info={
                "kind": "features",
                "shape": [train.features.shape[1]],
                "color": None,
                "image_size": None,
                "feature_names": train.feature_names,
            },
            source_splits=("train",) if test_path is None else ("train", "test"),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            resident=resident,
        )
        self.feature_names = train.feature_names
        self._tables = tables

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        return self._tables


def _classes(labels: npt.NDArray[np.str_]) -> tuple[bool, list[str]]:
    """Whether the labels are integers, and the class names in order."""
    distinct = np.unique(labels).tolist()
    integers = all(_INTEGER.fullmatch(label) for label in distinct)
    if integers:
        return True, [str(number) for number in sorted({int(label) for label in distinct})]
    return False, distinct


def _encoded(labels: npt.NDArray[np.str_], class_names: Sequence[str], integers: bool, source: Path) -> Tensor:
    index = {name: i for i, name in enumerate(class_names)}
    distinct, which = np.unique(labels, return_inverse=True)
    codes = []
    for label in distinct.tolist():
        name = str(int(label)) if integers and _INTEGER.fullmatch(label) else label
        if name not in index:
            raise DataError(
                f"{source}: class {name!r} is not among the {len(index)} training classes"
                f"{nearest(name, index)}; rename or remove its rows"
            )
        codes.append(index[name])
    return torch.tensor(codes, dtype=torch.int64)[torch.from_numpy(which)]


def _check_same_columns(train: Table, test: Table, source: Path) -> None:
    expected, found = train.features.shape[1], test.features.shape[1]
    if expected != found:
        raise DataError(f"{source}: {found} features per sample, the training file has {expected}; they must be equal")
    if train.feature_names is None or test.feature_names is None:
        return
    for j, (wanted, name) in enumerate(zip(train.feature_names, test.feature_names, strict=True), start=1):
        if wanted != name:
            raise DataError(
                f"{source}: feature column {j} is {name!r}, in the training file it is {wanted!r}; "
                "the columns must have the same names in the same order"
            )
