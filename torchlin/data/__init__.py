"""Data for linear classifiers: images and tables, held in memory and handed out in whole batches."""

from .base import ArrayDataModule
from .cifar import CIFAR10DataModule, CIFAR100DataModule
from .digits import DigitsDataModule
from .errors import DataError
from .folder import ImageFolderDataModule
from .standardize import Standardization
from .table import FeaturesDataModule

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
