"""Images in folders, one folder per class."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from torchlin.data.base import SPLITS, ArrayDataModule, Arrays, Resident, SplitName, checked_integer
from torchlin.data.decoding import BadFile, bad_files_message
from torchlin.data.errors import DataError
from torchlin.data.images import (
    IMAGE_SUFFIXES,
    Color,
    FoundFile,
    PixelFormat,
    has_image_suffix,
    image_shape,
    is_clutter,
    scan_images,
)
from torchlin.data.store import Loaded, Source, cache_folder, load
from torchlin.data.streaming import FileImages, check_files
from torchlin.registry import nearest

OnError = Literal["stop", "skip"]

_SPLIT_OF_FOLDER: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_LOOKED_FOR = f"looked for {' '.join(IMAGE_SUFFIXES)}"


class ImageFolderDataModule(ArrayDataModule):
    """Images in folders: one folder per class, its name the class name.

    The classes stand either in `train/`, `val/` and `test/` inside `root` (`valid` and `validation` count as
    val; val and test may be missing; other folders beside `train/` are ignored), or directly in `root`.
    Images may lie in subfolders of their class folder. The classes are those of the training folder, in
    alphabetical order, and hold for the other splits by name. Hidden files and folders, `__MACOSX`,
    `Thumbs.db` and `desktop.ini` are passed over.

    All images are decoded once, into a store on disk that later runs read as well: see `torchlin.data.store`. A file
    that was changed, added or removed since is noticed by name, size and time of change, and the store built anew.

    Args:
        root: folder that holds `train` (and `val`, `test`), or one folder of images per class.
        image_size: resize every image so that its shorter side has this many pixels, then crop it to a square
            around the centre. If left out, all images must have the same size.
        color: "rgb" for three channels or "gray" for one.
        cache: keep the decoded images on disk and map them into memory. If false, every batch is decoded when it is
            needed, in every epoch anew, after one pass that looks for files that cannot be read and one for the
            standardisation; the pixels, and so the results, are the same.
        cache_dir: where to keep them. If left out, the environment variable TORCHLIN_CACHE says so, or else the
            user's cache folder is taken; `python -m torchlin.data.cache` lists and clears it.
        on_error: what to do about files that cannot be read: "stop" before training and list them, or "skip" them,
            with a warning; `skipped_files` then names them.
        max_pixels: images of more pixels than this are refused as files that cannot be read, before they fill the
            memory. If left out, Pillow's own limit, 89 million.
        batch_size: samples per step of the optimizer, over all processes.
        num_workers: processes that load batches; 0 is fastest unless `cache` is false.
        seed: decides the order of training samples, how they are augmented, and which become validation samples.
        val_fraction: share of the training samples held out for validation, in [0, 1), if there is no `val`
            folder; 0 for none.
        resident: "device" keeps the pixels on the device that trains, so that no batch crosses the bus; "cpu" does not;
            "auto" does if that device is a GPU and they fill at most half of its free memory.
        flip: mirror each training image with probability ½.
        crop_padding: surround each training image with so many black pixels, then cut out a random part of the old
            size; 0 for none.

    Raises:
        DataError: the folder is missing, is no folder or does not hold at least two classes of images; on
            `setup`, files that cannot be read or images of different sizes.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        color: Color = "rgb",
        cache: bool = True,
        cache_dir: str | None = None,
        on_error: OnError = "stop",
        max_pixels: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        resident: Resident = "auto",
        flip: bool = False,
        crop_padding: int = 0,
    ) -> None:
        if resident == "device" and not cache:
            raise ValueError("resident='device' needs cache=True: without it no pixels are kept anywhere")
        if color not in get_args(Color):
            raise ValueError(f"color must be 'rgb' or 'gray', got {color!r}")
        if image_size is not None:
            image_size = checked_integer("image_size", image_size, at_least=1)
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        if max_pixels is not None:
            max_pixels = checked_integer("max_pixels", max_pixels, at_least=1)
        self.root = Path(root).expanduser()
        _check_is_folder(self.root)
        folders = _find_splits(self.root)
        listings = {
            split: {path.name: _scan(path, self.root) for path in _subfolders(folder)}
            for split, folder in folders.items()
        }
        _check_training_classes(folders["train"], listings["train"])
        class_names = list(listings["train"])
        name = self.root.resolve().name or "images"
        self._sources = {
            split: _index_classes(f"{name}-{split}", folders[split], listing, class_names)
            for split, listing in listings.items()
        }
        self._format = _pixel_format(self._sources["train"].files, color, image_size, max_pixels, self.root)
        self._cache = cache_folder(cache_dir) if cache else None
        self._on_error = on_error
        self._max_pixels = max_pixels
        self._skipped: dict[SplitName, list[str]] = {}
        super().__init__(
            name=name,
            class_names=class_names,
            input_info=self._format.to_info(),
            source_splits=[split for split in SPLITS if split in folders],
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            resident=resident,
            flip=flip,
            crop_padding=crop_padding,
        )

    @property
    def skipped_files(self) -> list[str]:
        """Files left out of the splits read so far because they cannot be read, relative to `root`."""
        return [name for split in SPLITS for name in self._skipped.get(split, ())]

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        loaded = {split: self._load(self._sources[split]) for split in splits}
        # All splits first, so that one error lists the bad files of all.
        reasons = [file.reason for parts in loaded.values() for file in parts.bad]
        total = sum(len(self._sources[split].files) for split in splits)
        if reasons and self._on_error == "stop":
            raise DataError(bad_files_message(reasons, total, f"{self.root}/"))
        if reasons:
            warnings.warn(
                f"{self.root}/: left out {len(reasons)} of {total} images that cannot be read, such as {reasons[0]}; "
                "skipped_files names them all",
                stacklevel=2,
            )
        for split, parts in loaded.items():
            self._skipped[split] = [self._sources[split].files[file.place].name for file in parts.bad]
            self._check_classes_left(split, parts)
        return {split: Arrays(parts.pixels, parts.targets) for split, parts in loaded.items()}

    def _load(self, source: Source) -> Loaded:
        if self._cache is not None:
            skip = self._on_error == "skip"
            return load(source, self._format, self._cache, max_pixels=self._max_pixels, skip=skip)
        bad = check_files([file.path for file in source.files], self._format, self._max_pixels)
        return Loaded(self._streamed(source, bad), source.without(bad), bad)

    def _streamed(self, source: Source, bad: Sequence[BadFile]) -> FileImages:
        left_out = {file.place for file in bad}
        paths = [file.path for i, file in enumerate(source.files) if i not in left_out]
        return FileImages(paths, self._format, self._max_pixels)

    def _check_classes_left(self, split: SplitName, parts: Loaded) -> None:
        """A split without samples, or a class without training samples, is no longer what was asked for."""
        left = set(parts.targets.tolist())
        gone = [name for i, name in enumerate(self.class_names) if i not in left]
        if parts.bad and (not left or (gone and split == "train")):
            what = f"of class {gone[0]!r}" if left else f"of the {split} split"
            raise DataError(f"{self.root}/: no image {what} can be read, such as {parts.bad[0].reason}")

    def state_of(self, split: SplitName) -> str:
        """SHA-256 of the split's files (name, size, time of change) and of how they are decoded; none is."""
        facts = {**self._sources[split].facts(self._format), "skip": self._on_error, "max_pixels": self._max_pixels}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def name_of(self, split: SplitName, row: int) -> str:
        skipped = set(self._skipped.get(split, ()))
        return str(self.root / [file.name for file in self._sources[split].files if file.name not in skipped][row])

    def compute_fingerprint(self) -> str:
        """Hash class, name and size in bytes of every file, relative to `root`; nothing is decoded."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in SPLITS:
            if split in self._sources:
                for file in self._sources[split].files:
                    digest.update(repr((split, file.name, file.size)).encode())
        return digest.hexdigest()


def _check_is_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{root}: is a file, not a folder of images; name the folder that holds the class folders")
    siblings = [path.name for path in _subfolders(root.parent)] if root.parent.is_dir() else []
    hint = nearest(root.name, siblings)
    raise DataError(f"{root}/: no such folder{hint}; name a folder that holds one folder of images per class")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_clutter(path.name))


def _scan(folder: Path, root: Path) -> list[FoundFile]:
    return scan_images(folder, folder.relative_to(root).as_posix() + "/")


def _find_splits(root: Path) -> dict[SplitName, Path]:
    """Tell which folder holds which split; a root without split folders is one training folder."""
    found: dict[SplitName, Path] = {}
    for folder in _subfolders(root):
        split = _SPLIT_OF_FOLDER.get(folder.name.lower())
        # A split holds class folders; without them it is a class that happens to be called 'train', of
        # vehicles say.
        if split is None or not _subfolders(folder):
            continue
        if split in found:
            raise DataError(f"{root}/: {found[split].name!r} and {folder.name!r} both hold the {split} split; keep one")
        found[split] = folder
    if found and "train" not in found:
        names = " and ".join(repr(folder.name) for folder in found.values())
        raise DataError(f"{root}/: has {names} but no folder 'train'; put the training images in {root / 'train'}/")
    return found or {"train": root}


def _check_training_classes(folder: Path, listing: Mapping[str, Sequence[FoundFile]]) -> None:
    if not listing:
        loose = any(has_image_suffix(path.name) and not is_clutter(path.name) for path in folder.iterdir())
        what = "images but no class folders" if loose else "no class folders and no images"
        raise DataError(f"{folder}/: {what}; put the images of each class into a folder of its own")
    if not any(listing.values()):
        raise DataError(f"{folder}/: no images found in {len(listing)} class folders ({_LOOKED_FOR}); add images")
    for name, files in listing.items():
        if not files:
            raise DataError(
                f"{folder}/: no images found in class folder {name!r} ({_LOOKED_FOR}); remove the folder or add images"
            )
    if len(listing) == 1:
        (name,) = listing
        hint = f" (if its subfolders are the classes, name {folder / name}/ instead)"
        hint = hint if _subfolders(folder / name) else ""
        raise DataError(f"{folder}/: only one class folder, {name!r}; at least two are needed{hint}")


def _index_classes(
    name_of_source: str, folder: Path, listing: Mapping[str, Sequence[FoundFile]], class_names: Sequence[str]
) -> Source:
    index = {name: i for i, name in enumerate(class_names)}
    for name in listing:
        if name not in index:
            raise DataError(
                f"{folder}/: class {name!r} is not among the {len(index)} training classes"
                f"{nearest(name, index)}; rename or remove the folder"
            )
    files = [file for found in listing.values() for file in found]
    if not files:
        raise DataError(f"{folder}/: no images found ({_LOOKED_FOR}); remove the folder or add images")
    targets = [index[name] for name, found in listing.items() for _ in found]
    return Source(name_of_source, folder, files, targets, class_names)


def _pixel_format(
    files: Sequence[FoundFile], color: Color, image_size: int | None, max_pixels: int | None, root: Path
) -> PixelFormat:
    channels = 3 if color == "rgb" else 1
    if image_size is not None:
        return PixelFormat((channels, image_size, image_size), color, image_size)
    for file in files:
        try:
            height, width = image_shape(file.path, color, max_pixels)
        except DataError:
            continue  # `setup` lists the bad files, all of them
        return PixelFormat((channels, height, width), color)
    raise DataError(f"{root}/: none of {len(files)} images can be read, such as {files[0].path}")
