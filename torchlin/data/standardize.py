"""Mean and standard deviation of a training split, exact and in one block of memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchlin.heads import Standardization

Blocks = Callable[[], Iterable[Tensor]]


# The squares of so many pixels add up to less than 2²⁴, so in float32 every partial sum is an exact integer.
_EXACT_ROWS = 256


def standardize_pixels(blocks: Blocks) -> Standardization:
    """Standardisation of uint8 blocks (m, …), read once; all sums are exact integers, so order is free."""
    n = 0
    total = squares = torch.zeros((), dtype=torch.int64)
    for block in blocks():
        n += len(block)
        for rows in block.flatten(1).split(_EXACT_ROWS):
            x = rows.float()
            total = total + x.sum(0).long()
            squares = squares + x.square_().sum(0).long()
    # Around the integer part q of the mean nothing cancels: Σ(x − q)² is an exact integer, Σ(x − q) = r < n.
    q = total // n
    r = total - q * n
    around_q = squares - 2 * q * total + q * q * n
    variance = (around_q.double() - r.double().square() / n) / n
    return _rounded(total.double() / n / 255, variance.sqrt() / 255)


def standardize_features(blocks: Blocks) -> Standardization:
    """Standardisation of float blocks (m, p), read twice: first the mean, then the deviations from it."""
    n = 0
    # Deviations from the first row: a constant column gives exact zeros, hence a standard deviation of
    # exactly 0.
    origin = next(iter(blocks()))[0].double()
    total = torch.zeros_like(origin)
    for block in blocks():
        n += len(block)
        total += (block.double() - origin).sum(0)
    mean = origin + total / n
    variance = torch.zeros_like(origin)
    for block in blocks():
        variance += (block.double() - mean).square().sum(0)
    return _rounded(mean, (variance / n).sqrt())


def _rounded(mean: Tensor, std: Tensor) -> Standardization:
    std = std.float()
    return Standardization(mean.float(), torch.where(std > 0, std, torch.ones_like(std)))
