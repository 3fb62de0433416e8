"""Seeded, stratified splits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the rows 0 … n−1 into (kept, held out), every class in proportion.

    ⌈fraction · n⌉ rows are held out, shared among the classes by largest remainder, so that many small
    classes still give a held-out part; every class keeps at least one row, which may make it fewer. The
    result depends on the arguments alone.

    Args:
        targets: class indices, int64 (n,).
        fraction: share held out, in [0, 1).
        seed: which of the possible splits.

    Returns:
        two int64 tensors of row numbers, ascending and disjoint, together all rows.
    """
    labels = targets.numpy()
    n = len(labels)
    counts = np.bincount(labels)
    rng = np.random.default_rng(seed)
    # Rounded, because 0.1 · 30 may come out as 3.0000000000000004 and the remainders of equal classes must
    # tie.
    shares = np.round(fraction * counts, 9)
    room = np.maximum(counts - 1, 0)
    quota = np.minimum(np.floor(shares).astype(np.int64), room)
    wanting = np.lexsort((rng.permutation(len(counts)), quota - shares))
    wanting = wanting[quota[wanting] < room[wanting]]
    quota[wanting[: max(0, math.ceil(round(fraction * n, 9)) - int(quota.sum()))]] += 1

    shuffled = rng.permutation(n)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first_of_class = np.cumsum(counts) - counts
    place_in_class = np.arange(n) - np.repeat(first_of_class, counts)
    held = np.zeros(n, dtype=bool)
    held[by_class] = place_in_class < np.repeat(quota, counts)
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
