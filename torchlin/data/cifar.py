"""CIFAR-10 and CIFAR-100, read by torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchvision import datasets

from torchlin.data.base import ArrayDataModule, Arrays, Resident, SplitName
from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat

# Known before anything is read; in the order of the class indices.
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
    "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
    "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
    "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
    "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
    "wardrobe whale willow_tree wolf woman worm"
)


class _CIFARDataModule(ArrayDataModule):
    source: ClassVar[type[datasets.CIFAR10]]
    classes: ClassVar[str]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        resident: Resident = "auto",
        flip: bool = False,
        crop_padding: int = 0,
    ) -> None:
        """Describe the data; nothing is read yet.

        Args:
            root: folder that holds, or will hold, the folder of unpacked files.
            download: fetch the files (170 MB) into `root` if they are not there.
            batch_size: samples per step of the optimizer, over all processes.
            num_workers: processes that load batches; 0 is fastest for data in memory.
            seed: decides the order of training samples, how they are augmented, and which become validation samples.
            val_fraction: share of the training samples held out for validation, in [0, 1); 0 for none.
            resident, flip, crop_padding: see `ImageFolderDataModule`.
        """
        super().__init__(
            name=self.source.__name__.lower(),
            class_names=self.classes.split(),
            input_info=PixelFormat((3, 32, 32), "rgb").to_info(),
            source_splits=("train", "test"),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            resident=resident,
            flip=flip,
            crop_padding=crop_padding,
        )
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if that was asked for and they are not there yet."""
        if self.download:
            try:
                self.source(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(f"{self.root}/: downloading {self.source.url} failed: {error}") from error

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        self.prepare_data()
        return {split: self._read_one(train=split == "train") for split in splits}

    def _read_one(self, *, train: bool) -> Arrays:
        try:
            # torchvision compares checksums first, so nothing but the published files is unpickled.
            data = self.source(self.root, train=train)
        except RuntimeError:
            source = self.source
            expected = self.root / source.base_folder / source.test_list[0][0]
            raise DataError(
                f"{self.root}/: the {source.__name__} files are missing or damaged (expected {expected}); set "
                f"download=True (--data.download true on the command line) or unpack {source.filename} there"
            ) from None
        pixels = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        return Arrays(torch.from_numpy(pixels), torch.tensor(data.targets))


class CIFAR10DataModule(_CIFARDataModule):
    """CIFAR-10: 50,000 + 10,000 colour images of 32×32 pixels in ten classes.

    Raises:
        DataError: on `setup`, files that are missing or whose checksum is wrong.
    """

    source = datasets.CIFAR10
    classes = _CIFAR10_CLASSES


class CIFAR100DataModule(_CIFARDataModule):
    """CIFAR-100: 50,000 + 10,000 colour images of 32×32 pixels in a hundred fine classes.

    Raises:
        DataError: on `setup`, files that are missing or whose checksum is wrong.
    """

    source = datasets.CIFAR100
    classes = _CIFAR100_CLASSES
