"""The feature store: what a frozen network says of every image, computed once, kept on disk and mapped into memory.

A store is a folder `<cache>/<name>-<key>` that holds

- `features.bin`: float32 or bfloat16 (n, p), little-endian, nothing but the numbers;
- `targets.i64`: class indices, little-endian int64 (n,);
- `extra.safetensors`: tensors that whoever computed the features wants to find again; may be missing;
- `manifest.json`: the facts that the key is made of, the sizes, and when it was made.

The key is the hash of everything that the numbers depend on, so a store is never out of date: other facts are another
store. It grows in `<name>-<key>.partial`, a batch of rows at a time; `progress.json` there says how many rows are on
the disk for certain. Whoever is interrupted, or killed, goes on behind those, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from torchlin.data.errors import DataError
from torchlin.data.loading import Inputs
from torchlin.data.store import FULL, MANIFEST, folder_to_disk, locked, mapped, read_manifest, to_disk
from torchlin.storage import replace_file

FORMAT = 1
_FEATURES, _TARGETS, _EXTRA, _PROGRESS = "features.bin", "targets.i64", "extra.safetensors", "progress.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Seconds between two times that rows are made to last.
_SAVE_EVERY = 2.0


class Images(NamedTuple):
    """What is to be turned into features.

    Attributes:
        inputs: uint8 (n, C, H, W).
        targets: int64 (n,).
        name_of: what a message calls the image in a row.
    """

    inputs: Inputs
    targets: Tensor
    name_of: Callable[[int], str]


class Stored(NamedTuple):
    """A feature store.

    Attributes:
        features: (n, p), mapped from its file; not to be written to.
        targets: int64 (n,).
        extra: the tensors that were kept beside them.
        computed: how many rows were computed just now, and not found.
    """

    features: Tensor
    targets: Tensor
    extra: dict[str, Tensor]
    computed: int


class Extractor(Protocol):
    """What turns images into features: called for blocks of rows, in order."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Prepared:
    """What is needed once features have to be computed: the images, the network, and tensors to keep."""

    images: Images
    extractor: Extractor
    extra: Mapping[str, Tensor]


def load_features(
    name: str,
    facts: Mapping[str, Any],
    prepare: Callable[[Mapping[str, Tensor]], Prepared],
    cache: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 256,
    report: Callable[[int, int], None] | None = None,
) -> Stored:
    """Open the store of these facts, after computing what is missing of it.

    Args:
        name: for people who look at the cache, such as "photos-train-resnet18".
        facts: all that the features depend on; plain JSON values.
        prepare: called if rows are missing, with the `extra` of an interrupted store (empty for a new one).
        cache: folder of all stores; made if it does not exist.
        dtype: "float32" or "bfloat16", of the numbers on disk.
        batch_size: rows per call of the extractor. A batch that does not fit in memory is halved, and the rest of the
            way is gone with the half, with a warning.
        report: called with how many rows are done and how many there are.

    Raises:
        DataError: features that are not finite (the image is named); a cache folder that is full or cannot be used.
        ValueError: an unknown dtype, batch_size < 1, an extractor that does not return one row per image.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    facts = {"format": FORMAT, "dtype": dtype, **facts}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "_", name.encode(errors="replace").decode())[:60].strip(".")
    folder = cache / f"{readable}-{key}"
    try:
        with locked(folder):
            found = _open(folder, facts)
            if found is not None:
                return found
            return _compute(folder, facts, prepare, dtype, batch_size, report)
    except OSError as error:
        if error.errno in FULL:
            raise DataError(
                f"{cache}/: no room for the features ({error.strerror}); make room (python -m torchlin.data.cache "
                "lists what is there; what was computed is kept) or choose another folder with cache_dir"
            ) from None
        raise DataError(f"{cache}/: the cache folder cannot be used ({error}); choose another with cache_dir") from None


def _open(folder: Path, facts: Mapping[str, Any]) -> Stored | None:
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("facts") != facts:
        return None
    try:
        n, p = int(manifest["images"]), int(manifest["features"])
        dtype = _DTYPES[manifest["facts"]["dtype"]]
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST}
        if sizes != manifest["bytes"] or sizes[_FEATURES] != n * p * dtype.itemsize:
            return None
        features = mapped(folder / _FEATURES, (n, p), dtype)
        targets = torch.from_numpy(np.fromfile(folder / _TARGETS, dtype="<i8").astype(np.int64))
        extra = load_file(folder / _EXTRA) if _EXTRA in sizes else {}
    except (OSError, KeyError, TypeError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # when it was last used
    return Stored(features, targets, extra, 0)


def _compute(
    folder: Path,
    facts: Mapping[str, Any],
    prepare: Callable[[Mapping[str, Tensor]], Prepared],
    dtype: str,
    batch_size: int,
    report: Callable[[int, int], None] | None,
) -> Stored:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    begun = _progress(partial, batch_size)
    if begun is None:
        shutil.rmtree(partial)
        partial.mkdir()
    kept = load_file(partial / _EXTRA) if begun is not None and (partial / _EXTRA).is_file() else {}
    images, extractor, extra = (prepared := prepare(kept)).images, prepared.extractor, prepared.extra
    if extra and not kept:
        replace_file(partial / _EXTRA, save({k: v.detach().cpu().contiguous() for k, v in extra.items()}))
    n = len(images.targets)
    done, width = begun or (0, 0)
    with (partial / _FEATURES).open("r+b" if begun else "wb") as file:
        file.truncate(done * width * _DTYPES[dtype].itemsize)
        file.seek(0, os.SEEK_END)
        saved = time.monotonic()
        for start, rows in _blocks(images, extractor, done, batch_size):
            if width not in (0, rows.shape[1]):
                raise ValueError(f"the backbone returned rows of {rows.shape[1]} features, and of {width} before")
            width = rows.shape[1]
            _check_finite(rows, start, images)
            file.write(rows.to(_DTYPES[dtype]).cpu().contiguous().view(torch.uint8).numpy().data)
            done = start + len(rows)
            if time.monotonic() - saved > _SAVE_EVERY:
                _save_progress(partial, file, done, width, batch_size)
                saved = time.monotonic()
            if report is not None:
                report(done, n)
        _save_progress(partial, file, done, width, batch_size)
    computed = n - (begun or (0, 0))[0]
    targets = images.targets.cpu().numpy().astype(np.dtype("<i8"))
    replace_file(partial / _TARGETS, targets.tobytes())
    names = [name for name in (_FEATURES, _TARGETS, _EXTRA) if (partial / name).exists()]
    manifest = {
        "kind": "features", "facts": facts, "source": facts.get("source", "?"), "images": n, "features": width,
        "bytes": {name: (partial / name).stat().st_size for name in names},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    replace_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    (partial / _PROGRESS).unlink()
    if folder.exists():  # damaged, or it would have been opened
        shutil.rmtree(folder)
    partial.rename(folder)
    folder_to_disk(folder.parent)
    found = _open(folder, facts)
    if found is None:
        raise DataError(f"{folder}/: was written and cannot be read back; choose another folder with cache_dir")
    return found._replace(computed=computed)


def _progress(partial: Path, batch_size: int) -> tuple[int, int] | None:
    """How many rows of which width an interrupted store holds for certain; None to begin anew."""
    try:
        said = json.loads((partial / _PROGRESS).read_bytes())
        rows, width = int(said["rows"]), int(said["width"])
        # With other batches the last bits may be others.
        if said["batch_size"] != batch_size or rows % batch_size:
            return None
        size = (partial / _FEATURES).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (rows, width) if size >= rows * width * said["itemsize"] else None


def _save_progress(partial: Path, file: Any, rows: int, width: int, batch_size: int) -> None:
    to_disk(file)
    itemsize = 1 if rows * width == 0 else file.tell() // (rows * width)
    said = {"rows": rows, "width": width, "batch_size": batch_size, "itemsize": itemsize}
    replace_file(partial / _PROGRESS, json.dumps(said).encode())


def _blocks(images: Images, extractor: Extractor, done: int, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """First row and features of each batch."""
    n = len(images.targets)
    size = batch_size
    for start in range(done, n, batch_size):
        index = torch.arange(start, min(n, start + batch_size))
        pixels = images.inputs.index_select(0, index)
        parts: list[Tensor] = []
        at = 0
        while at < len(pixels):
            try:
                part = extractor(pixels[at : at + size])
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                size = (size + 1) // 2
                warnings.warn(
                    f"a batch of {2 * size} images does not fit in memory: going on with {size} at a time", stacklevel=2
                )
                continue
            if part.dim() != 2 or len(part) != len(pixels[at : at + size]):
                raise ValueError(
                    f"the backbone returns {tuple(part.shape)} for {len(pixels[at : at + size])} images: one row of "
                    "features per image is needed, see layer and pooling"
                )
            parts.append(part)
            at += len(part)
        yield start, parts[0] if len(parts) == 1 else torch.cat(parts)


def _out_of_memory(error: BaseException) -> bool:
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def _check_finite(rows: Tensor, start: int, images: Images) -> None:
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        row = start + int((~finite).nonzero()[0])
        raise DataError(
            f"{images.name_of(row)}: the backbone's features of this image are not finite (NaN or infinite); leave it "
            "out, or use another backbone, layer or preprocess"
        )
