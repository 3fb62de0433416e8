"""From arrays in memory to batches: one gather per batch, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
Loader = DataLoader[Batch]

# Of at most 33,025 rows, squared pixels add up in 32 bits.
_BLOCK_ROWS = 2**15
_BLOCK_NUMBERS = 2**24


class ArrayDataset(Dataset[Batch]):
    """Rows of an array and their class indices, gathered a batch at a time.

    Args:
        inputs: uint8 (n, C, H, W) or float32 (n, p).
        targets: class indices, int64 (n,).
        rows: int64 row numbers that make up this data set, in order; None for all. A split is a list of rows
            and never a copy.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.rows = rows

    def __len__(self) -> int:
        return len(self.targets) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = index if self.rows is None else int(self.rows[index])
        return self.inputs[row], self.targets[row]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather one batch, inputs (b, …) and targets (b,); `DataLoader` prefers this to `__getitem__`."""
        return self.gather(torch.tensor(indices, dtype=torch.int64))

    def gather(self, indices: Tensor) -> Batch:
        """Inputs (b, …) and targets (b,) at positions `indices`, int64 (b,), of this data set."""
        rows = indices if self.rows is None else self.rows[indices]
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows)

    def labels(self) -> Tensor:
        """Class indices of the whole data set, int64 (n,)."""
        return self.targets if self.rows is None else self.targets[self.rows]

    def blocks(self) -> Iterator[Tensor]:
        """Inputs in order, at most 32,768 rows and about 2²⁴ numbers at a time."""
        size = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // self.inputs[0].numel()))
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if self.rows is None:
                yield self.inputs[start:stop]
            else:
                yield self.inputs.index_select(0, self.rows[start:stop])


class EpochSampler(Sampler[int]):
    """A permutation of 0 … n−1 that depends on (seed, epoch) and on nothing that happened before.

    Lightning calls `set_epoch` before each epoch, also after a resume, so a resumed run sees the order that
    the uninterrupted one would have seen. In a plain loop every pass is the next epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        self.epoch += 1
        return iter(order.tolist())


def make_loader(dataset: ArrayDataset, batch_size: int, num_workers: int, shuffle_seed: int | None) -> Loader:
    """Return an ordinary `DataLoader` over whole batches; shuffled when there is a seed, last batch kept."""
    # Lightning advises more workers for every loader with fewer than two; for a gather from memory, which
    # takes microseconds, they only cost.
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
    sampler = None if shuffle_seed is None else EpochSampler(len(dataset), shuffle_seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        persistent_workers=num_workers > 0,
    )


def _as_it_is(batch: T) -> T:
    return batch
