"""Images in folders, one folder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from torchlin.data.base import SPLITS, ArrayDataModule, Arrays, SplitName, checked_integer
from torchlin.data.decoding import decode_files
from torchlin.data.errors import DataError, nearest
from torchlin.data.images import (
    IMAGE_SUFFIXES,
    Color,
    PixelFormat,
    decode_image,
    has_image_suffix,
    is_clutter,
    list_images,
)

_SPLIT_OF_FOLDER: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_LOOKED_FOR = f"looked for {' '.join(IMAGE_SUFFIXES)}"


class _Files(NamedTuple):
    paths: list[Path]
    targets: list[int]


class ImageFolderDataModule(ArrayDataModule):
    """Images in folders: one folder per class, its name the class name.

    The classes stand either in `train/`, `val/` and `test/` inside `root` (`valid` and `validation` count as
    val; val and test may be missing; other folders beside `train/` are ignored), or directly in `root`.
    Images may lie in subfolders of their class folder. The classes are those of the training folder, in
    alphabetical order, and hold for the other splits by name. Hidden files and folders, `__MACOSX`,
    `Thumbs.db` and `desktop.ini` are passed over. All images are decoded once, into memory.

    Args:
        root: folder that holds `train` (and `val`, `test`), or one folder of images per class.
        image_size: resize every image so that its shorter side has this many pixels, then crop it to a square
            around the centre. If left out, all images must have the same size.
        color: "rgb" for three channels or "gray" for one.
        batch_size: samples per batch.
        num_workers: processes that load batches; 0 is fastest for data in memory.
        seed: decides the order of training samples and which of them become validation samples.
        val_fraction: share of the training samples held out for validation, in [0, 1), if there is no `val`
            folder; 0 for none.

    Raises:
        DataError: the folder is missing, is no folder or does not hold at least two classes of images; on
            `setup`, files that cannot be read or images of different sizes.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        color: Color = "rgb",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        if color not in get_args(Color):
            raise ValueError(f"color must be 'rgb' or 'gray', got {color!r}")
        if image_size is not None:
            image_size = checked_integer("image_size", image_size, at_least=1)
        self.root = Path(root).expanduser()
        _check_is_folder(self.root)
        folders = _find_splits(self.root)
        listings = {
            split: {path.name: list_images(path) for path in _subfolders(folder)} for split, folder in folders.items()
        }
        _check_training_classes(folders["train"], listings["train"])
        class_names = list(listings["train"])
        self._files = {
            split: _index_classes(folders[split], listing, class_names) for split, listing in listings.items()
        }
        self._format = _pixel_format(self._files["train"].paths, color, image_size, self.root)
        super().__init__(
            name=self.root.resolve().name or "images",
            class_names=class_names,
            input_info=self._format.to_info(),
            source_splits=[split for split in SPLITS if split in folders],
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
        )

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        # One call for all splits, so that one error lists the bad files of all.
        paths = [path for split in splits for path in self._files[split].paths]
        images = decode_files(paths, self._format, where=f"{self.root}/")
        parts = images.split([len(self._files[split].paths) for split in splits])
        return {
            split: Arrays(part, torch.tensor(self._files[split].targets))
            for split, part in zip(splits, parts, strict=True)
        }

    def compute_fingerprint(self) -> str:
        """Hash class, name and size in bytes of every file, relative to `root`; nothing is decoded."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in SPLITS:
            if split in self._files:
                for path in self._files[split].paths:
                    name = path.relative_to(self.root).as_posix()
                    digest.update(repr((split, name, path.stat().st_size)).encode())
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


def _check_training_classes(folder: Path, listing: Mapping[str, Sequence[Path]]) -> None:
    if not listing:
        loose = any(has_image_suffix(path.name) and not is_clutter(path.name) for path in folder.iterdir())
        what = "images but no class folders" if loose else "no class folders and no images"
        raise DataError(f"{folder}/: {what}; put the images of each class into a folder of its own")
    if not any(listing.values()):
        raise DataError(f"{folder}/: no images found in {len(listing)} class folders ({_LOOKED_FOR}); add images")
    for name, paths in listing.items():
        if not paths:
            raise DataError(
                f"{folder}/: no images found in class folder {name!r} ({_LOOKED_FOR}); remove the folder or add images"
            )
    if len(listing) == 1:
        (name,) = listing
        hint = f" (if its subfolders are the classes, name {folder / name}/ instead)"
        hint = hint if _subfolders(folder / name) else ""
        raise DataError(f"{folder}/: only one class folder, {name!r}; at least two are needed{hint}")


def _index_classes(folder: Path, listing: Mapping[str, Sequence[Path]], class_names: Sequence[str]) -> _Files:
    index = {name: i for i, name in enumerate(class_names)}
    for name in listing:
        if name not in index:
            raise DataError(
                f"{folder}/: class {name!r} is not among the {len(index)} training classes"
                f"{nearest(name, index)}; rename or remove the folder"
            )
    labelled = [(path, index[name]) for name, paths in listing.items() for path in paths]
    if not labelled:
        raise DataError(f"{folder}/: no images found ({_LOOKED_FOR}); remove the folder or add images")
    return _Files([path for path, _ in labelled], [target for _, target in labelled])


def _pixel_format(paths: Sequence[Path], color: Color, image_size: int | None, root: Path) -> PixelFormat:
    channels = 3 if color == "rgb" else 1
    if image_size is not None:
        return PixelFormat((channels, image_size, image_size), color, image_size)
    for path in paths:
        try:
            _, height, width = decode_image(path, color).shape
        except DataError:
            continue  # `setup` lists the bad files, all of them
        return PixelFormat((channels, height, width), color)
    raise DataError(f"{root}/: none of {len(paths)} images can be read, such as {paths[0]}")
