"""Data for linear classifiers: images and tables, held in memory or mapped from disk, handed out in whole batches."""

from torchlin.data.base import ArrayDataModule
from torchlin.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from torchlin.data.digits import DigitsDataModule
from torchlin.data.errors import DataError
from torchlin.data.folder import ImageFolderDataModule
from torchlin.data.table import FeaturesDataModule
from torchlin.heads import Standardization

__all__ = [
    "ArrayDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DataError",
    "DigitsDataModule",
    "FeaturesDataModule",
    "ImageFolderDataModule",
    "Standardization",
]
