"""Reading a table of features and targets, whatever the file format."""

from __future__ import annotations

import csv
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchlin.data.errors import DataError
from torchlin.registry import nearest

FEATURES = "features"
# What NumPy and zipfile raise on damaged archives; OSError is handled for all formats together.
_BAD_ARCHIVE = (ValueError, TypeError, AttributeError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Table:
    """One table file.

    Attributes:
        features: float32 (n, p), all finite; or uint8 (n, p), which is read as pixels.
        labels: the target column as text, str (n,).
        feature_names: the columns' names, p of them; None for files that have no column names.
    """

    features: Tensor
    labels: npt.NDArray[np.str_]
    feature_names: list[str] | None


def read_table(path: Path, target: str) -> Table:
    """Read a table; `target` names the column or key of the class labels.

    Raises:
        DataError: the file is missing, of an unknown format, or holds something that cannot be used.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown table format {path.suffix!r}; use one of {' '.join(_READERS)}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a table ({' '.join(_READERS)})")
    if not path.exists():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, siblings)}")
    try:
        table = reader(path, target)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not table.features.numel():
        rows, columns = table.features.shape
        raise DataError(f"{path}: {rows} rows of {columns} features; at least one row and one feature are needed")
    return table


def _read_csv(path: Path, target: str) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _parse_csv(path, file, target)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a table of comma-separated values ({error})") from None


def _parse_csv(path: Path, file: Iterable[str], target: str) -> Table:
    rows = csv.reader(file, strict=True)
    header = [name.strip() for name in next(rows, [])]
    at = _find_target(path, header, target)
    names = header[:at] + header[at + 1 :]
    labels: list[str] = []
    lines = array("q")
    values = array("d")
    for row in rows:
        if not row:
            continue
        where = f"line {rows.line_num}"
        if len(row) != len(header):
            raise DataError(f"{path}: {where} has {len(row)} cells, the header has {len(header)}; they must be equal")
        labels.append(row.pop(at).strip())
        if not labels[-1]:
            raise DataError(f"{path}: {where}, column {target!r} (the target) is empty; fill it in or drop the line")
        lines.append(rows.line_num)
        try:
            # Python reads '2024_01' as a number.
            values.extend(map(_no_number if "_" in "".join(row) else float, row))
        except ValueError:
            raise DataError(_cell_message(path, where, names, row, target)) from None
    features = np.array(values, dtype=np.float64).reshape(len(labels), len(names))
    _check_labels_are_classes(path, labels, target)
    return Table(
        _as_float32(path, torch.from_numpy(features), lambda i, j: f"line {lines[i]}, column {names[j]!r}"),
        np.array(labels, dtype=np.str_),
        names,
    )


def _no_number(cell: str) -> float:
    if "_" in cell:
        raise ValueError
    return float(cell)


def _cell_message(path: Path, where: str, names: Sequence[str], row: Sequence[str], target: str) -> str:
    for name, cell in zip(names, row, strict=True):
        try:
            _no_number(cell)
        except ValueError:
            if not cell.strip():
                return f"{path}: {where}, column {name!r} is empty; fill it in or drop the line"
            return (
                f"{path}: {where}, column {name!r} holds {cell!r}, not a number; "
                f"all columns but the target ({target!r}) must be numeric"
            )
    raise AssertionError("the row has no such cell")


def _read_parquet(path: Path, target: str) -> Table:
    try:
        import pandas
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs pandas and pyarrow; pip install 'torchlin[tables]'") from None
    try:
        frame = pandas.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    header = [str(name) for name in frame.columns]
    at = _find_target(path, header, target)
    names = header[:at] + header[at + 1 :]
    columns = []
    if frame.empty:
        return Table(torch.empty(len(frame), len(names)), np.empty(0, dtype=np.str_), names)
    for j, name in enumerate(header):
        column = frame.iloc[:, j]
        missing = column.isna().to_numpy()
        if missing.any():
            raise DataError(f"{path}: row {missing.argmax() + 1}, column {name!r} is empty; fill it in or drop the row")
        if j == at:
            _check_label_kind(path, target, "f" if pandas.api.types.is_float_dtype(column.dtype) else "O")
            labels = column.astype(np.int64) if pandas.api.types.is_bool_dtype(column.dtype) else column
            continue
        if not pandas.api.types.is_numeric_dtype(column.dtype):
            raise DataError(
                f"{path}: row 1, column {name!r} holds {column.iloc[0]!r}, not a number; "
                f"all columns but the target ({target!r}) must be numeric"
            )
        columns.append(column.to_numpy(dtype=np.float64))
    features = np.stack(columns, axis=1) if columns else np.empty((len(frame), 0))
    return Table(
        _as_float32(path, torch.from_numpy(features), lambda i, j: f"row {i + 1}, column {names[j]!r}"),
        np.array([str(label) for label in labels], dtype=np.str_),
        names,
    )


def _read_npz(path: Path, target: str) -> Table:
    try:
        # Never with allow_pickle: unpickling runs whatever code the file holds.
        with np.load(path, allow_pickle=False) as file:
            _check_keys(path, list(file.keys()), target)
            arrays = {key: _array_of(path, file, key) for key in (FEATURES, target)}
    except DataError:
        raise
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from None
    kind = arrays[FEATURES].dtype.kind
    if kind not in "fiub":
        raise DataError(f"{path}: {FEATURES!r} has dtype {arrays[FEATURES].dtype}; it must be numeric")
    features = arrays[FEATURES]
    if features.dtype != np.uint8:
        features = features.astype(np.float32 if kind in "iub" else np.float64)
    return _table_of_arrays(path, torch.from_numpy(features), arrays[target], target)


def _array_of(path: Path, file: np.lib.npyio.NpzFile, key: str) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(file[key])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: {key!r} is an array of Python objects, which are never unpickled; store numbers or text"
        ) from None


def _read_safetensors(path: Path, target: str) -> Table:
    try:
        with safe_open(path, framework="pt") as file:
            _check_keys(path, list(file.keys()), target)
            features, labels = file.get_tensor(FEATURES), file.get_tensor(target)
    except SafetensorError as error:
        raise DataError(f"{path}: not a readable .safetensors file ({error})") from None
    if features.is_complex():
        raise DataError(f"{path}: {FEATURES!r} has dtype {features.dtype}; it must be numeric")
    # NumPy has no bfloat16; what kind of number the target holds is all that its check needs.
    return _table_of_arrays(path, features, (labels.double() if labels.is_floating_point() else labels).numpy(), target)


_READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _table_of_arrays(path: Path, features: Tensor, labels: npt.NDArray[np.generic], target: str) -> Table:
    if features.ndim != 2:
        raise DataError(f"{path}: {FEATURES!r} has shape {tuple(features.shape)}; it must be (samples, features)")
    if labels.ndim != 1:
        raise DataError(f"{path}: {target!r} has shape {labels.shape}; it must be (samples,), one label per sample")
    if len(features) != len(labels):
        raise DataError(
            f"{path}: {FEATURES!r} has {len(features)} rows, {target!r} has {len(labels)}; they must be equal"
        )
    _check_label_kind(path, target, labels.dtype.kind)
    texts = (labels.astype(np.int64) if labels.dtype.kind == "b" else labels).astype(np.str_)
    return Table(_as_float32(path, features, lambda i, j: f"row {i + 1}, feature {j + 1}"), texts, None)


def _find_target(path: Path, header: Sequence[str], target: str) -> int:
    seen: set[str] = set()
    for name in header:
        if name in seen:
            raise DataError(f"{path}: two columns are called {name!r}; rename one of them")
        seen.add(name)
    if target not in seen:
        separator = next((s for s in (";", "\t", "|") if len(header) == 1 and s in header[0]), None)
        if separator is not None:
            raise DataError(f"{path}: the columns are separated by {separator!r}; separate them by commas")
        raise DataError(
            f"{path}: no target column {target!r}{nearest(target, header)}; the columns are "
            f"{_listed(header)}; choose one with target="
        )
    return header.index(target)


def _check_keys(path: Path, keys: Sequence[str], target: str) -> None:
    for key in (FEATURES, target):
        if key not in keys:
            raise DataError(
                f"{path}: no key {key!r}{nearest(key, keys)}; the file holds {_listed(keys)}; "
                f"it must hold {FEATURES!r} (samples, features) and {target!r} (samples,)"
            )


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(repr, names[:most])) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _check_label_kind(path: Path, target: str, kind: str) -> None:
    if kind not in "iubUO":
        what = _KINDS.get(kind, "other things")
        raise DataError(f"{path}: target {target!r} holds {what}, not class labels; store integers")


_KINDS = {"f": "floating-point numbers", "c": "complex numbers", "S": "bytes"}


def _check_labels_are_classes(path: Path, labels: Sequence[str], target: str) -> None:
    """Refuse a column that is numeric but not integer: a quantity, not a class."""
    fraction = None
    for label in set(labels):
        try:
            if not float(label).is_integer() or not label.lstrip("+-").isdecimal():
                fraction = label
        except ValueError:
            return
    if fraction is not None:
        raise DataError(f"{path}: target {target!r} holds {fraction!r}, not a class label; store integers or names")


def _as_float32(path: Path, features: Tensor, place: Callable[[int, int], str]) -> Tensor:
    """Finite float32; uint8 stays, because a head reads it as pixels (x/255) and training must do the same."""
    if features.dtype == torch.uint8:
        return features.contiguous()
    result = features.to(torch.float32)
    finite = result.isfinite()
    if not finite.all():
        i, j = (~finite).nonzero()[0].tolist()
        value = features[i, j].item()
        raise DataError(f"{path}: {place(i, j)} holds {value}, not a finite 32-bit number; replace it or drop the row")
    return result.contiguous()
