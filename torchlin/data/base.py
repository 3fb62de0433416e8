"""What all data modules share: splits, loaders, and facts about the training split."""

from __future__ import annotations

import abc
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from torchlin.data.augment import Augmentation
from torchlin.data.loading import ArrayDataset, BatchSampler, Inputs, Loader
from torchlin.data.splits import stratified_split
from torchlin.data.standardize import standardize_features, standardize_pixels
from torchlin.heads import Standardization
from torchlin.machine import available_memory

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


Resident = Literal["auto", "cpu", "device"]


class Arrays(NamedTuple):
    """One split as the source has it.

    Attributes:
        inputs: uint8 pixels (n, C, H, W) or float32 features (n, p); a tensor, or something else that yields rows.
        targets: class indices, int64 (n,).
    """

    inputs: Inputs
    targets: Tensor


class ArrayDataModule(LightningDataModule, abc.ABC):
    """Base of the data modules whose splits are arrays: a subclass describes its data and reads them.

    Right after construction `name`, `class_names`, `num_classes`, `in_features` and `input_info` are known.
    Batches are `(x, y)`: x uint8 (b, C, H, W) or float32 (b, p), y int64 (b,). A batch is that of the whole run: of R
    processes each takes every R-th sample of it, so a run on several processes is the run on one. Nothing is padded.

    Args:
        name: short name of the data, used for run folders.
        class_names: one name per class, in the order of the class indices.
        input_info: what one input is, as plain JSON values; `shape` is its shape without the batch dimension.
        source_splits: which of train, val and test the source itself has.
        batch_size: samples per step of the optimizer, over all processes.
        num_workers: processes that load batches; 0 is fastest for data in memory.
        seed: decides the order of training samples, how they are augmented, and which become validation samples.
        val_fraction: share of the training samples held out for validation, in [0, 1), if the source has no
            validation split; 0 for none.
        resident: "device" keeps the data on the device that trains, so that no batch crosses the bus; "cpu" does not;
            "auto" does if that device is a GPU and the data fill at most half of its free memory.
        flip: mirror each training image with probability ½.
        crop_padding: surround each training image with so many black pixels, then cut out a random part of the old
            size; 0 for none.

    Raises:
        ValueError: a number out of range, an unknown `resident`, an augmentation of inputs that are no images.
        TypeError: a number of another type.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        input_info: Mapping[str, Any],
        source_splits: Sequence[SplitName],
        *,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        resident: Resident = "auto",
        flip: bool = False,
        crop_padding: int = 0,
    ) -> None:
        super().__init__()
        if resident not in get_args(Resident):
            raise ValueError(f"resident must be 'auto', 'cpu' or 'device', got {resident!r}")
        self.name: str = name
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.input_info = dict(input_info)
        self.in_features = math.prod(self.input_info["shape"])
        self.batch_size = checked_integer("batch_size", batch_size, at_least=1)
        self.num_workers = checked_integer("num_workers", num_workers, at_least=0)
        self.seed = checked_integer("seed", seed, at_least=0)
        self.val_fraction = _checked_fraction(val_fraction)
        self.resident = resident
        crop_padding = checked_integer("crop_padding", crop_padding, at_least=0)
        if (flip or crop_padding) and self.input_info["kind"] != "pixels":
            raise ValueError("flip and crop_padding are for images, and these data are features")
        self._augmentation = Augmentation(flip, crop_padding, self.seed) if flip or crop_padding else None
        self._source_splits = tuple(source_splits)
        self._arrays: dict[SplitName, Arrays] = {}
        self._datasets: dict[SplitName, ArrayDataset | None] = {}
        self._copies: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._standardization: Standardization | None = None
        self._fingerprint: str | None = None

    @abc.abstractmethod
    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        """Read the named splits of the source; called at most once per split, and may return others too."""

    def setup(self, stage: str | None = None) -> None:
        """Read what `stage` ("fit", "validate", "test"; None for all) needs and is not in memory yet.

        "fit" also reads the test split: a file that cannot be read should stop a run before it trains.
        """
        needed: dict[str | None, tuple[SplitName, ...]] = {
            "validate": ("val",),
            "test": ("test",),
            "predict": (),
        }
        self._read(needed.get(stage, SPLITS))

    def train_dataloader(self) -> Loader:
        """Training batches, shuffled by (seed, epoch) and augmented; the last one may be smaller."""
        return self._loader(self._train(), self.seed)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Validation batches in order; an empty list if there is no validation split."""
        return self._ordered_loader("val")

    def test_dataloader(self) -> Loader | list[Loader]:
        """Test batches in order; an empty list if there is no test split."""
        return self._ordered_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on `device`; one that is there already without being searched for tensors."""
        there = isinstance(batch, tuple) and all(isinstance(part, Tensor) and part.device == device for part in batch)
        return batch if there else super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def standardization(self) -> Standardization:
        """Mean and standard deviation of the training split, on raw input (x/255 for pixels)."""
        if self._standardization is None:
            train = self._train()
            pixels = train.inputs.dtype == torch.uint8
            self._standardization = (standardize_pixels if pixels else standardize_features)(train.blocks)
        return self._standardization

    @property
    def class_counts(self) -> Tensor:
        """Samples of each class in the training split, int64 (k,)."""
        return torch.bincount(self._train().labels(), minlength=self.num_classes)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in `train`, `val` and `test`; 0 where there is no such split."""
        self._read(SPLITS)
        return {split: len(self._dataset(split) or ()) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source's data, as hexadecimal digits; independent of `seed` and `val_fraction`."""
        if self._fingerprint is None:
            self._fingerprint = self.compute_fingerprint()
        return self._fingerprint

    @property
    def source_splits(self) -> tuple[SplitName, ...]:
        """Which of train, val and test the source itself has."""
        return self._source_splits

    def arrays(self, split: SplitName) -> Arrays:
        """A split as the source has it, before validation samples are taken out of it; never augmented."""
        self._read((split,))
        return self._arrays[split]

    def state_of(self, split: SplitName) -> str:
        """SHA-256 of all that the arrays of a split of the source depend on, as they are now."""
        inputs, targets = self.arrays(split)
        digest = hashlib.sha256(repr((tuple(inputs.shape), str(inputs.dtype))).encode())
        for block in (*ArrayDataset(inputs, targets).blocks(), targets):
            digest.update(block.contiguous().numpy().data)
        return digest.hexdigest()

    def name_of(self, split: SplitName, row: int) -> str:
        """What a message calls a sample of a split of the source."""
        return f"{self.name}, {split} sample {row}"

    def compute_fingerprint(self) -> str:
        """Hash the class names and all arrays of the source."""
        self._read(SPLITS)
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in SPLITS:
            if split in self._arrays:
                inputs, targets = self._arrays[split]
                for array, blocks in ((inputs, ArrayDataset(inputs, targets).blocks()), (targets, [targets])):
                    digest.update(repr((split, tuple(array.shape), str(array.dtype))).encode())
                    for block in blocks:
                        digest.update(block.contiguous().numpy().data)
        return digest.hexdigest()

    def _train(self) -> ArrayDataset:
        dataset = self._dataset("train")
        assert dataset is not None
        return dataset

    def _ordered_loader(self, split: SplitName) -> Loader | list[Loader]:
        dataset = self._dataset(split)
        return self._loader(dataset, None) if dataset else []

    def _loader(self, dataset: ArrayDataset, seed: int | None) -> Loader:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if isinstance(dataset.inputs, Tensor) and self._resides(dataset.inputs, device):
            dataset = self._on(dataset, device)
        streamed = dataset.targets.device.type == "cpu"
        return Loader(
            dataset,
            self.batch_size,
            sampler=BatchSampler(len(dataset), self.batch_size, seed),
            num_workers=self.num_workers if streamed else 0,
            pin_memory=streamed and device.type == "cuda",
        )

    def _resides(self, inputs: Tensor, device: torch.device) -> bool:
        if device.type == "cpu" or self.resident == "cpu":
            return False
        if self.resident == "device" or (inputs.data_ptr(), device) in self._copies:
            return True
        return device.type == "cuda" and 2 * inputs.nbytes <= available_memory(device)

    def _on(self, dataset: ArrayDataset, device: torch.device) -> ArrayDataset:
        inputs = cast("Tensor", dataset.inputs)
        key = (inputs.data_ptr(), device)  # splits that are rows of one array share its copy
        try:
            if key not in self._copies:
                self._copies[key] = (inputs.to(device), dataset.targets.to(device))
            rows = None if dataset.rows is None else dataset.rows.to(device)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"resident='device': {inputs.nbytes / 1e9:,.2f} GB of data do not fit on {device}; use resident='auto'"
            ) from None
        return ArrayDataset(*self._copies[key], rows, dataset.augmentation)

    def _dataset(self, split: SplitName) -> ArrayDataset | None:
        if split not in self._datasets:
            self._read((split,))
            if split == "test" or "val" in self._source_splits:
                arrays = self._arrays.get(split)
                augmentation = self._augmentation if split == "train" else None
                self._datasets[split] = arrays and ArrayDataset(*arrays, augmentation=augmentation)
            else:
                self._carve_validation(self._arrays["train"])
        return self._datasets[split]

    def _carve_validation(self, train: Arrays) -> None:
        kept, held = stratified_split(train.targets, self.val_fraction, self.seed)
        self._datasets["train"] = ArrayDataset(*train, kept if len(held) else None, self._augmentation)
        self._datasets["val"] = ArrayDataset(*train, held) if len(held) else None

    def _read(self, splits: Sequence[SplitName]) -> None:
        carved = "val" in splits and "val" not in self._source_splits
        wanted = [
            split
            for split in self._source_splits
            if split not in self._arrays and (split in splits or (carved and split == "train"))
        ]
        if wanted:
            for split, (inputs, targets) in self.read_splits(wanted).items():
                # Rows are gathered five times as fast from a contiguous array.
                inputs = inputs.contiguous() if isinstance(inputs, Tensor) else inputs
                self._arrays[split] = Arrays(inputs, targets)


def checked_integer(name: str, value: int, *, at_least: int) -> int:
    """Return `value` as an int, or raise an error that names the argument."""
    expected = f"{name} must be an integer of at least {at_least}"
    if isinstance(value, bool):
        raise TypeError(f"{expected}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{expected}, got {value!r}") from None
    if number < at_least:
        raise ValueError(f"{expected}, got {number}")
    return number


def _checked_fraction(value: float) -> float:
    expected = "val_fraction must be a number in [0, 1) (0 for no validation split)"
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{expected}, got {value!r}") from None
    if not 0 <= fraction < 1:
        raise ValueError(f"{expected}, got {value!r}")
    return fraction
