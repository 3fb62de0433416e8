"""CIFAR-10, for the benchmarks that need it as two tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def train_pixels(root: str | None) -> tuple[Tensor, Tensor]:
    """The training images (n, 3072) in uint8 and their classes; `root` holds train/ with one folder per class."""
    if root is None:
        raise SystemExit("CIFAR-10 needs --root FOLDER, with one folder of images per class in FOLDER/train")
    from torchlin.data import ImageFolderDataModule

    data = ImageFolderDataModule(root, val_fraction=0)
    inputs, targets = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    return inputs.flatten(1), targets
