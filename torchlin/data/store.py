"""The pixel store: a folder of images decoded once, kept on disk, and mapped into memory by every later run.

A store is a folder `<cache>/<name>-<key>` that holds

- `pixels.u8`: uint8 (n, C, H, W), nothing but the numbers;
- `targets.i64`: class indices, little-endian int64 (n,);
- `files.json`: the files' names in the same order, relative to the image folder;
- `manifest.json`: everything that must still be so for the arrays to be right (`Source.facts`), the sizes of the other
  three files, and the files that were left out.

It is written beside, in `<name>-<key>.building-<process>`, and renamed when it is whole and on the disk; it is never
changed afterwards, only replaced. Whoever opens, builds or removes it holds the lock `.locks/<name>-<key>`, which the
system releases when a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import platformdirs
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from torchlin.data.decoding import BadFile, decode_chunks
from torchlin.data.errors import DataError
from torchlin.data.images import FoundFile, PixelFormat, decode_image, decoder_versions
from torchlin.data.loading import Inputs

FORMAT = 1
CACHE_VARIABLE = "TORCHLIN_CACHE"
MANIFEST = "manifest.json"
_PIXELS, _TARGETS, _FILES = "pixels.u8", "targets.i64", "files.json"
_UNFINISHED = re.compile(r"\.((building|old)-\d+|partial)$")
_MOMENT = 1.0  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Without it Linux refuses to map more than there is memory, although nothing is ever written. Python knows the number
# from 3.13 on; elsewhere than on these machines it may be another.
_NO_RESERVE = getattr(
    mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
)


@dataclass(frozen=True)
class Source:
    """The image files of one split, as they are on disk now.

    Attributes:
        name: for people who look at the cache, such as "photos-train".
        folder: where the split's class folders are.
        files: all image files, in order.
        targets: class index of each.
        class_names: in the order of the indices.
    """

    name: str
    folder: Path
    files: Sequence[FoundFile]
    targets: Sequence[int]
    class_names: Sequence[str]

    @property
    def paths(self) -> list[Path]:
        return [Path(file.path) for file in self.files]

    def without(self, bad: Sequence[BadFile]) -> Tensor:
        """Targets of the files that are not bad, int64 (n,)."""
        left_out = {file.place for file in bad}
        return torch.tensor([target for i, target in enumerate(self.targets) if i not in left_out], dtype=torch.int64)

    def store_name(self, pixel_format: PixelFormat) -> str:
        """One store per (folder, image size, colour, decoder): its readable name and the hash of these."""
        what = [os.path.realpath(self.folder), pixel_format.image_size, pixel_format.color, decoder_versions()]
        readable = re.sub(r"[^\w.-]+", "_", self.name.encode(errors="replace").decode())[:40].strip(".")
        return f"{readable}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"

    def facts(self, pixel_format: PixelFormat) -> dict[str, Any]:
        """What a store must say about itself to be a store of these files as they are now; plain JSON values."""
        digest = hashlib.sha256()
        for file, target in zip(self.files, self.targets, strict=True):
            digest.update(repr((file.name, file.size, file.mtime_ns, target)).encode())
        return {
            "format": FORMAT,
            "source": os.path.realpath(self.folder),
            "fingerprint": digest.hexdigest(),
            "files": len(self.files),
            "class_names": list(self.class_names),
            "decoder": decoder_versions(),
            **pixel_format.to_info(),
        }


class Loaded(NamedTuple):
    """The pixels of a source.

    Attributes:
        pixels: uint8 (n, C, H, W), in files that are mapped into memory (not to be written to) or decoded on demand.
        targets: class indices, int64 (n,).
        bad: the files left out. If there are any and they were not to be left out, there are no arrays.
    """

    pixels: Inputs
    targets: Tensor
    bad: list[BadFile]


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where stores are kept: `cache_dir`, else the variable TORCHLIN_CACHE, else the user's cache folder."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("torchlin", appauthor=False)
    return Path(chosen).expanduser()


def load(
    source: Source, pixel_format: PixelFormat, cache: Path, *, max_pixels: int | None = None, skip: bool = False
) -> Loaded:
    """Open the store of a source, after building it if there is none or it no longer holds.

    Args:
        source: the files.
        pixel_format: how to decode, and the shape that all images must then have.
        cache: folder of all stores; made if it does not exist.
        max_pixels: see `decode_image`.
        skip: leave bad files out; otherwise a source with bad files gets no store.

    Raises:
        DataError: an image of another size; a cache folder that is full or cannot be written to.
    """
    folder = cache / source.store_name(pixel_format)
    facts = source.facts(pixel_format)
    try:
        with locked(folder):
            _remove_unfinished(folder)
            loaded = _open(folder, source, pixel_format, facts, max_pixels, skip)
            if loaded is None:
                bad = _build(folder, source, pixel_format, facts, max_pixels, skip)
                if bad and not skip:
                    return _nothing(pixel_format, bad)
                loaded = _open(folder, source, pixel_format, facts, max_pixels, skip)
                if loaded is None:
                    raise DataError(f"{folder}/: was written and cannot be read back; {_elsewhere()}")
        return loaded
    except OSError as error:
        if error.errno in FULL:
            need = len(source.files) * (math.prod(pixel_format.shape) + 8)
            raise DataError(
                f"{cache}/: no room for the decoded images, which need {need / 1e6:,.1f} MB ({error.strerror}); "
                f"make room (python -m torchlin.data.cache lists what is there) or {_elsewhere()}"
            ) from None
        raise DataError(f"{cache}/: the cache folder cannot be used ({error}); {_elsewhere()}") from None
    except NotImplementedError as error:  # a network drive without locks
        raise DataError(f"{cache}/: the cache folder cannot be used ({error}); {_elsewhere()}") from None


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a store; a process that has to wait for it says so, once.

    Raises:
        Timeout: another process holds it, and `wait` is false.
    """
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        # To open a store takes a moment, which is no reason to speak of waiting.
        lock.acquire(timeout=_MOMENT if wait else 0)
    except Timeout:
        if not wait:
            raise
        print(f"{folder}/: another process is building this store; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store; None if it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def remove(folder: Path) -> None:
    """Remove a store, whose lock the caller holds; it is gone at once or not at all."""
    _set_aside(folder)
    _remove_unfinished(folder)


def is_unfinished(name: str) -> bool:
    """Whether a folder's name is that of a store being built or removed."""
    return _UNFINISHED.search(name) is not None


def _elsewhere() -> str:
    return f"choose another folder with cache_dir or {CACHE_VARIABLE}, or decode every batch anew with cache=False"


def _nothing(pixel_format: PixelFormat, bad: list[BadFile]) -> Loaded:
    return Loaded(torch.empty((0, *pixel_format.shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64), bad)


def _set_aside(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}.old-{os.getpid()}"))


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that died have left of this store: whoever holds its lock is alone with it."""
    for other in folder.parent.glob(f"{folder.name}.*"):
        if is_unfinished(other.name):
            shutil.rmtree(other, ignore_errors=True)


def _open(
    folder: Path,
    source: Source,
    pixel_format: PixelFormat,
    facts: Mapping[str, Any],
    max_pixels: int | None,
    skip: bool,
) -> Loaded | None:
    """Open a store, or return None if there is none that holds what it should."""
    manifest = read_manifest(folder)
    if manifest is None or any(manifest.get(key) != value for key, value in facts.items()):
        return None
    try:
        sizes = {name: (folder / name).stat().st_size for name in (_PIXELS, _TARGETS, _FILES)}
        if manifest["bytes"] != sizes:
            return None
        bad = _still_bad(source, pixel_format, manifest["skipped"], max_pixels)
        if bad is None:
            return None
        if bad and not skip:
            return _nothing(pixel_format, bad)
        targets = source.without(bad)
        if (folder / _TARGETS).read_bytes() != _target_bytes(targets):
            return None
        if sizes[_PIXELS] != len(targets) * math.prod(pixel_format.shape):
            return None
        pixels = mapped(folder / _PIXELS, (len(targets), *pixel_format.shape), torch.uint8)
    except (OSError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # when it was last used
    return Loaded(pixels, targets, bad)


def _still_bad(
    source: Source, pixel_format: PixelFormat, skipped: Sequence[str], max_pixels: int | None
) -> list[BadFile] | None:
    """The files that were left out, tried again; None if one can be read now (permissions leave no other trace)."""
    names = set(skipped)
    bad = []
    for i, file in enumerate(source.files if names else ()):
        if file.name in names:
            try:
                decode_image(Path(file.path), pixel_format.color, pixel_format.image_size, max_pixels)
                return None
            except DataError as error:
                bad.append(BadFile(i, str(error)))
    return bad


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file's pages: read when touched, dropped when memory is short; writing would copy the page."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        if os.name == "posix":
            flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            pages = mmap.mmap(file.fileno(), size, flags=flags, prot=access)
        else:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _build(
    folder: Path,
    source: Source,
    pixel_format: PixelFormat,
    facts: Mapping[str, Any],
    max_pixels: int | None,
    skip: bool,
) -> list[BadFile]:
    """Decode all files and put the store in its place, unless there are bad ones that may not be left out."""
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    bad: list[BadFile] = []
    try:
        building.mkdir()
        with (building / _PIXELS).open("wb") as file:
            _reserve(file, len(source.files) * math.prod(pixel_format.shape))
            with contextlib.closing(decode_chunks(source.paths, pixel_format, max_pixels)) as chunks:
                for chunk in chunks:
                    bad += chunk.bad
                    if skip or not bad:
                        file.write(chunk.pixels.data)
            file.truncate()
            to_disk(file)
        if bad and not skip:
            return bad
        left_out = {file.place for file in bad}
        names = [file.name for i, file in enumerate(source.files) if i not in left_out]
        _write(building / _TARGETS, _target_bytes(source.without(bad)))
        _write(building / _FILES, json.dumps(names).encode())
        manifest = {
            **facts,
            "images": len(names),
            "skipped": [source.files[file.place].name for file in bad],
            "bytes": {name: (building / name).stat().st_size for name in (_PIXELS, _TARGETS, _FILES)},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        _write(building / MANIFEST, json.dumps(manifest, indent=1).encode())
        folder_to_disk(building)
        if folder.exists():
            _set_aside(folder)
        building.rename(folder)
        folder_to_disk(folder.parent)
        return bad
    finally:
        _remove_unfinished(folder)


def _target_bytes(targets: Tensor) -> bytes:
    return targets.numpy().astype(np.dtype("<i8"), copy=False).tobytes()


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room on disk now, where the system can: a full disk shows before an hour of decoding, not after."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None or not size:
        return
    try:
        reserve(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in FULL:
            raise


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        to_disk(file)


def to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Make names in a folder last; systems on which a folder cannot be opened (Windows) do so by themselves."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
