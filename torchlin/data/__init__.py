"""Data for linear classifiers: images and tables, held in memory or mapped from disk, handed out in whole batches.

The data modules need Lightning and load when their name is first used; files of this folder that do not need it, such
as `torchlin.data.images`, load without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchlin.data.errors import DataError
from torchlin.heads import Standardization
from torchlin.registry import nearest

if TYPE_CHECKING:
    from torchlin.data.base import ArrayDataModule
    from torchlin.data.cifar import CIFAR10DataModule, CIFAR100DataModule
    from torchlin.data.digits import DigitsDataModule
    from torchlin.data.folder import ImageFolderDataModule
    from torchlin.data.table import FeaturesDataModule

_LAZY = {
    "ArrayDataModule": "torchlin.data.base",
    "CIFAR10DataModule": "torchlin.data.cifar",
    "CIFAR100DataModule": "torchlin.data.cifar",
    "DigitsDataModule": "torchlin.data.digits",
    "FeaturesDataModule": "torchlin.data.table",
    "ImageFolderDataModule": "torchlin.data.folder",
}

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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'torchlin.data' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
