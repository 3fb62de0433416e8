"""Random changes to training images, a whole batch at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Augmentation:
    """Horizontal flips and padded random crops of uint8 images, where the images are (on a GPU if they are there).

    What happens to an image depends on (seed, epoch, its position in the data set) alone: not on the batch it is in, on
    the number of processes, or on what was drawn before. So a run that is resumed, or spread over processes, sees the
    images that it would have seen.

    Args:
        flip: mirror each image with probability ½.
        padding: surround the image with so many black pixels on each side, then cut out an image of the old size at a
            random place; 0 for none.
        seed: of the random numbers.
    """

    def __init__(self, flip: bool, padding: int, seed: int) -> None:
        self.flip = flip
        self.padding = padding
        self.seed = seed
        self._drawn: tuple[int, int, Tensor] | None = None

    def __call__(self, images: Tensor, positions: Tensor, epoch: int, size: int) -> Tensor:
        """Images uint8 (b, C, H, W), at `positions`, int64 (b,), of a data set of `size` images."""
        draws = self._draws(epoch, size)[positions.cpu()].to(images.device, non_blocking=True).long()
        mirrored, down, right = draws.unbind(1)
        if self.padding:
            images = _crop(F.pad(images, (self.padding,) * 4), down, right, images.shape[-2:])
        if self.flip:
            images = torch.where((mirrored == 1).view(-1, 1, 1, 1), images.flip(-1), images)
        return images

    def _draws(self, epoch: int, size: int) -> Tensor:
        """For all images of an epoch: whether mirrored, rows from the top, columns from the left; int16 (n, 3)."""
        if self._drawn is None or self._drawn[:2] != (epoch, size):
            ends = (2, 2 * self.padding + 1, 2 * self.padding + 1)
            # The 1 keeps these numbers apart from those of the order.
            draws = np.random.default_rng((self.seed, epoch, 1)).integers(0, ends, (size, 3), dtype=np.int16)
            self._drawn = (epoch, size, torch.from_numpy(draws))
        return self._drawn[2]


def _crop(padded: Tensor, down: Tensor, right: Tensor, size: torch.Size) -> Tensor:
    """padded[i, :, down[i] : down[i] + H, right[i] : right[i] + W] for every image i."""
    windows = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view: (b, C, places, places, H, W)
    which = torch.arange(len(padded), device=padded.device)
    return windows[which, :, down, right]
