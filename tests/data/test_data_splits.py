"""Stratified splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from torchlin.data.splits import stratified_split


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_parts_are_disjoint_and_ascending_and_cover_everything(fraction: float) -> None:
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, 7, 1000))
    kept, held = stratified_split(targets, fraction, seed=3)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1000))
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(held, held.sort().values)
    assert len(held) == round(1000 * fraction)
    counts = torch.bincount(targets, minlength=7)
    assert ((torch.bincount(targets[held], minlength=7) - fraction * counts).abs() < 1).all()


def test_depends_on_the_seed_and_on_nothing_else() -> None:
    targets = torch.arange(200) % 4
    first = stratified_split(targets, 0.2, seed=0)[1]
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(first, stratified_split(targets, 0.2, seed=0)[1])
    assert not torch.equal(first, stratified_split(targets, 0.2, seed=1)[1])


def test_fraction_of_a_whole_number_is_not_rounded_up() -> None:
    assert len(stratified_split(torch.arange(30) % 3, 0.1, seed=0)[1]) == 3


def test_many_small_classes_still_give_a_held_out_part() -> None:
    assert len(stratified_split(torch.arange(400) % 100, 0.1, seed=0)[1]) == 40


def test_every_class_keeps_a_row() -> None:
    targets = torch.tensor([0] * 50 + [1] * 2 + [2])
    for seed, fraction in itertools.product(range(20), (0.9, 1 - 1e-12)):
        kept, held = stratified_split(targets, fraction, seed)
        assert (torch.bincount(targets[kept], minlength=3) >= 1).all()
        assert 2 not in targets[held]


def test_single_rows_leave_nothing_to_hold_out() -> None:
    kept, held = stratified_split(torch.arange(5), 0.5, seed=0)
    assert len(kept) == 5
    assert len(held) == 0
    assert held.dtype == torch.int64
