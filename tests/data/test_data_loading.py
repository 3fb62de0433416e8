"""Whole-batch loading, the order of samples, and what Lightning makes of both."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.connectors import data_connector
from torch import Tensor

from torchlin.data import ArrayDataModule, DigitsDataModule
from torchlin.data.base import Arrays, SplitName
from torchlin.data.loading import ArrayDataset, EpochSampler, make_loader


class Numbered(ArrayDataModule):
    """Ten samples of two classes; sample i is (i, −i)."""

    def __init__(self, source_splits: Sequence[SplitName] = ("train",), **options: Any) -> None:
        info = {"kind": "features", "shape": [2], "color": None, "image_size": None}
        super().__init__("numbered", ["even", "odd"], info, source_splits, **options)
        self.asked: list[SplitName] = []

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        self.asked += splits
        numbers = torch.arange(10)
        inputs = torch.stack([numbers, -numbers], dim=1).float()
        return {split: Arrays(inputs, numbers % 2) for split in splits}


class Recorder(pl.LightningModule):
    """Trains one number and remembers which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.seen.append(batch[0][:, 0].tolist())
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        pass

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_batch_is_one_gather_and_equals_the_single_samples() -> None:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(0, 256, (50, 3, 4, 5), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, 3, 50))
    rows = torch.from_numpy(rng.permutation(50)[:30])
    for dataset in (ArrayDataset(inputs, targets), ArrayDataset(inputs, targets, rows)):
        indices = rng.permutation(len(dataset))[:8].tolist()
        x, y = dataset.__getitems__(indices)
        assert torch.equal(x, torch.stack([dataset[i][0] for i in indices]))
        assert torch.equal(y, torch.stack([dataset[i][1] for i in indices]))
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert torch.equal(torch.cat(list(dataset.blocks())), dataset.gather(torch.arange(len(dataset)))[0])


def test_a_batch_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayDataset, "__getitem__", None)
    loader = make_loader(ArrayDataset(torch.rand(10, 2), torch.arange(10)), 4, 0, shuffle_seed=None)
    assert [len(y) for _, y in loader] == [4, 4, 2]


def test_workers_give_the_same_batches() -> None:
    dataset = ArrayDataset(torch.rand(10, 2), torch.arange(10))
    alone = [y.tolist() for _, y in make_loader(dataset, 4, 0, shuffle_seed=1)]
    assert alone == [y.tolist() for _, y in make_loader(dataset, 4, 1, shuffle_seed=1)]


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        sampler = EpochSampler(100, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        orders[seed, epoch] = tuple(sampler)
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len(set(orders.values())) == 6
    plain_loop = EpochSampler(100, 0)
    assert [tuple(plain_loop) for _ in range(3)] == [orders[0, epoch] for epoch in range(3)]


def test_every_epoch_has_every_sample_once_and_keeps_the_last_batch() -> None:
    module = Numbered(batch_size=4, val_fraction=0)
    batches = [x[:, 0].tolist() for x, _ in module.train_dataloader()]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(itertools.chain(*batches)) == list(range(10))
    assert list(itertools.chain(*batches)) != list(range(10))


def test_resumed_training_sees_the_order_of_uninterrupted_training(tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path, epochs=3).fit(whole, Numbered(batch_size=4))
    first, rest = Recorder(), Recorder()
    half = trainer(tmp_path, epochs=1)
    half.fit(first, Numbered(batch_size=4))
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, epochs=3).fit(rest, Numbered(batch_size=4), ckpt_path=tmp_path / "half.ckpt")
    assert first.seen + rest.seen == whole.seen
    assert len(whole.seen) == 9
    assert whole.seen[:3] != whole.seen[3:6]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_does_not_ask_for_workers_and_accepts_missing_splits(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a machine with many cores.
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for module in (Numbered(num_workers=num_workers), Numbered(num_workers=num_workers, val_fraction=0)):
            trainer(tmp_path, epochs=1).fit(Recorder(), module)
        run = trainer(tmp_path, epochs=1)
        run.test(Recorder(), Numbered(("train", "test")))
    messages = [str(warning.message) for warning in caught]
    assert not [message for message in messages if "workers" in message]


def test_missing_splits_are_empty_lists() -> None:
    module = Numbered(val_fraction=0)
    module.setup("fit")
    assert module.val_dataloader() == []
    assert module.test_dataloader() == []
    assert module.sizes == {"train": 10, "val": 0, "test": 0}


def test_setup_reads_what_a_stage_needs_and_only_once() -> None:
    module = Numbered(("train", "val", "test"))
    module.setup("test")
    assert module.asked == ["test"]
    module.setup("validate")
    assert module.asked == ["test", "val"]
    module.setup("fit")
    module.setup("fit")
    module.setup()
    assert module.asked == ["test", "val", "train"]
    carved = Numbered(("train", "test"))
    carved.setup("validate")
    assert carved.asked == ["train"]
    carved.setup("predict")
    assert carved.asked == ["train"]


def test_val_of_the_source_is_used_as_it_is() -> None:
    module = Numbered(("train", "val"), val_fraction=0.5)
    assert module.sizes == {"train": 10, "val": 10, "test": 0}
    assert [y.tolist() for _, y in module.val_dataloader()] == [[0, 1] * 5]


def test_facts_are_known_without_setup_and_setup_twice_changes_nothing() -> None:
    module = Numbered(val_fraction=0.2)
    assert (module.name, module.num_classes, module.in_features) == ("numbered", 2, 2)
    counts, standardization, fingerprint = module.class_counts, module.standardization, module.fingerprint
    val = [x.tolist() for x, _ in module.val_dataloader()]
    module.setup("fit")
    module.setup("fit")
    assert counts.tolist() == [4, 4]
    assert counts.dtype == torch.int64
    assert module.standardization is standardization
    assert module.fingerprint == fingerprint
    assert len(fingerprint) == 64
    assert [x.tolist() for x, _ in module.val_dataloader()] == val
    held = set(torch.tensor(val[0])[:, 0].tolist())
    trained = np.array([i for i in range(10) if i not in held], dtype=np.float64)
    assert len(trained) == 8
    np.testing.assert_allclose(standardization.mean.numpy(), [trained.mean(), -trained.mean()])
    np.testing.assert_allclose(standardization.std.numpy(), [trained.std()] * 2, rtol=1e-6)


def test_seed_decides_validation_and_order_but_not_the_fingerprint() -> None:
    one, same, other = DigitsDataModule(seed=1), DigitsDataModule(seed=1), DigitsDataModule(seed=2)
    val = [torch.cat([x for x, _ in module.val_dataloader()]) for module in (one, same, other)]
    assert torch.equal(val[0], val[1])
    assert not torch.equal(val[0], val[2])
    train = [next(iter(module.train_dataloader()))[0] for module in (one, same, other)]
    assert torch.equal(train[0], train[1])
    assert not torch.equal(train[0], train[2])
    assert one.fingerprint == same.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer of at least 1, got 2.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer of at least 1, got True"),
        ({"num_workers": -1}, ValueError, "num_workers must be an integer of at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"val_fraction": 1}, ValueError, r"val_fraction must be a number in \[0, 1\) .*, got 1"),
        ({"val_fraction": -0.1}, ValueError, "val_fraction must be .*, got -0.1"),
        ({"val_fraction": float("nan")}, ValueError, "val_fraction must be .*, got nan"),
        ({"val_fraction": "much"}, TypeError, "val_fraction must be .*, got 'much'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Numbered(**options)
