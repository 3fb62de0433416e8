"""From arrays to batches: one gather per batch, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from torchlin.data.augment import Augmentation

Batch = tuple[Tensor, Tensor]

_BLOCK_ROWS = 2**15
_BLOCK_NUMBERS = 2**24


class Inputs(Protocol):
    """Rows of inputs, of which a tensor is one kind: uint8 (n, C, H, W) or float32 (n, p)."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """The rows `index`, int64 (b,), in this order; `dim` is 0."""


class Share(NamedTuple):
    """What one process takes of one batch.

    Attributes:
        positions: int64 (b,), positions in the data set.
        epoch: the epoch they are for; it decides how they are augmented.
    """

    positions: Tensor
    epoch: int


class ArrayDataset(Dataset[Batch]):
    """Rows of inputs and their class indices, gathered a batch at a time.

    Args:
        inputs: uint8 (n, C, H, W) or float32 (n, p).
        targets: class indices, int64 (n,), on the device of the inputs.
        rows: int64 row numbers that make up this data set, in order; None for all. A split is a list of rows
            and never a copy.
        augmentation: what is done to the inputs when they are gathered for training.
    """

    def __init__(
        self, inputs: Inputs, targets: Tensor, rows: Tensor | None = None, augmentation: Augmentation | None = None
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.rows = rows
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.targets) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: Tensor | Share) -> Batch: ...
    def __getitem__(self, index: int | Tensor | Share) -> Batch:
        """One sample, or a batch: inputs (b, …) and targets (b,)."""
        if isinstance(index, Share):
            x, y = self.gather(index.positions)
            if self.augmentation is not None:
                x = self.augmentation(x, index.positions, index.epoch, len(self))
            return x, y
        if isinstance(index, Tensor):
            return self.gather(index)
        x, y = self.gather(torch.tensor([range(len(self))[index]]))
        return x[0], y[0]

    def gather(self, positions: Tensor) -> Batch:
        """Inputs (b, …) and targets (b,) at `positions`, int64 (b,), of this data set, not augmented."""
        positions = positions.to(self.targets.device, non_blocking=True)
        rows = positions if self.rows is None else self.rows.index_select(0, positions)
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows)

    def labels(self) -> Tensor:
        """Class indices of the whole data set, int64 (n,)."""
        return self.targets if self.rows is None else self.targets[self.rows]

    def blocks(self) -> Iterator[Tensor]:
        """Inputs in order, at most 32,768 rows and about 2²⁴ numbers at a time."""
        size = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // max(1, self.inputs.shape[1:].numel())))
        for start in range(0, len(self), size):
            positions = torch.arange(start, min(start + size, len(self)))
            yield self.inputs.index_select(0, positions if self.rows is None else self.rows[positions])


class BatchSampler(DistributedSampler[Share]):
    """Whole batches of positions 0 … n−1: in order, or a permutation that depends on (seed, epoch) alone.

    One sampler for one and for many processes: a batch is that of the whole run, and process r of R takes the positions
    r, r + R, r + 2R, … of it. So the batches, and a mean over them, are the same for every number of processes. Nothing
    is padded or left out: of a last batch that is small a process may get nothing, which is an empty share.

    Lightning calls `set_epoch` before each epoch, also after a resume, so a resumed run sees the order that
    the uninterrupted one would have seen. In a plain loop every pass is the next epoch.

    Args:
        size: n.
        batch_size: samples of a batch, over all processes.
        seed: of the permutation; None for 0 … n−1 in order.
    """

    # A `DistributedSampler` by name, so that Lightning does not put another one in its place, which would pad.
    def __init__(self, size: int, batch_size: int, seed: int | None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            cast("Dataset[Any]", range(size)),
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
        )
        self.size = size
        self.batch_size = batch_size
        self.order_seed = seed
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the epoch of the next pass."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Share]:
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        if self.order_seed is None:
            order = torch.arange(self.size)
        else:
            order = torch.from_numpy(np.random.default_rng((self.order_seed, epoch)).permutation(self.size))
        for batch in order.split(self.batch_size)[start:]:
            yield Share(batch[self.rank :: self.num_replicas], epoch)


class Loader(DataLoader[Batch]):
    """An ordinary `DataLoader` over whole batches that knows how far it is: a run may stop and go on inside an epoch.

    Args:
        dataset: what to load.
        samples: samples of a batch, over all processes.
        sampler: the batches. Any other than a `BatchSampler` stands for "in order" (Lightning's overfit_batches puts
            one there).
        num_workers: processes that load batches.
        pin_memory: see `DataLoader`.
        shuffle: False; Lightning says so when it makes a copy.
        batch_sampler: None; likewise.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        samples: int,
        *,
        sampler: Sampler[Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        shuffle: Literal[False] = False,
        batch_sampler: None = None,
    ) -> None:
        # Lightning advises more workers for every loader with fewer than two; for a gather from memory, which
        # takes microseconds, they only cost.
        warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        # The attributes have the names of the arguments, by which Lightning makes a copy with another sampler.
        self.samples = samples
        self._order = sampler if isinstance(sampler, BatchSampler) else BatchSampler(len(dataset), samples, None)
        self._at = (0, 0)
        super().__init__(
            dataset,
            batch_size=None,
            sampler=self._order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Any:
        # Nothing happens before the first batch is asked for, so `set_epoch` and `load_state_dict` are in time.
        epoch, done = self._order.epoch, self._order.start
        self._at = (epoch, done)
        for batch in super().__iter__():
            done += 1
            self._at = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "batches"}: the pass that is running, and how many of its batches were handed out."""
        epoch, batches = self._at
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on from there."""
        finished = state["batches"] >= len(self._order)
        self._order.epoch = state["epoch"] + finished
        self._order.start = 0 if finished else state["batches"]
        self._at = (self._order.epoch, self._order.start)
