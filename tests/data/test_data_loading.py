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
from torchlin.data.loading import ArrayDataset, BatchSampler, Loader, Share


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

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return batch[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_a_batch_is_one_gather_and_equals_the_single_samples() -> None:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(0, 256, (50, 3, 4, 5), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, 3, 50))
    rows = torch.from_numpy(rng.permutation(50)[:30])
    for dataset in (ArrayDataset(inputs, targets), ArrayDataset(inputs, targets, rows)):
        indices = rng.permutation(len(dataset))[:8].tolist()
        x, y = dataset[torch.tensor(indices)]
        assert torch.equal(x, torch.stack([dataset[i][0] for i in indices]))
        assert torch.equal(y, torch.stack([dataset[i][1] for i in indices]))
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert torch.equal(torch.cat(list(dataset.blocks())), dataset.gather(torch.arange(len(dataset)))[0])


def test_a_batch_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    gather = ArrayDataset.gather
    monkeypatch.setattr(ArrayDataset, "gather", lambda self, at: calls.append(len(at)) or gather(self, at))
    loader = Loader(ArrayDataset(torch.rand(10, 2), torch.arange(10)), 4)
    assert [len(y) for _, y in loader] == [4, 4, 2] == calls


def test_workers_give_the_same_batches() -> None:
    dataset = ArrayDataset(torch.rand(10, 2), torch.arange(10))
    alone, helped = (Loader(dataset, 4, sampler=BatchSampler(10, 4, 1), num_workers=workers) for workers in (0, 1))
    for _ in range(2):
        assert [y.tolist() for _, y in alone] == [y.tolist() for _, y in helped]


def order(sampler: BatchSampler) -> tuple[int, ...]:
    return tuple(position for share in sampler for position in share.positions.tolist())


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        sampler = BatchSampler(100, 30, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        orders[seed, epoch] = order(sampler)
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len(set(orders.values())) == 6
    plain_loop = BatchSampler(100, 30, 0)
    assert [order(plain_loop) for _ in range(3)] == [orders[0, epoch] for epoch in range(3)]


def shares(
    size: int, batch_size: int, seed: int | None, replicas: int, epoch: int = 0, start: int = 0
) -> list[list[Share]]:
    """What each of `replicas` processes gets in an epoch."""
    out = []
    for rank in range(replicas):
        sampler = BatchSampler(size, batch_size, seed)
        sampler.num_replicas, sampler.rank = replicas, rank
        sampler.set_epoch(epoch)
        sampler.start = start
        assert len(sampler) == -(-size // batch_size)
        out.append(list(sampler))
    return out


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (9, 4), (12, 4), (5, 1), (2, 8), (1, 1), (10, 3)])
def test_the_shares_of_a_batch_interleaved_are_the_batch_of_one_process(
    size: int, batch_size: int, seed: int | None, replicas: int
) -> None:
    for epoch in (0, 3):
        (alone,) = shares(size, batch_size, seed, 1, epoch)
        parts = shares(size, batch_size, seed, replicas, epoch)
        assert {len(part) for part in parts} == {-(-size // batch_size)}
        for batch, *split in zip(alone, *parts, strict=True):
            whole = torch.full_like(batch.positions, -1)
            for rank, share in enumerate(split):
                whole[rank::replicas] = share.positions
                assert share.epoch == epoch
                assert share.positions.dtype == torch.int64
            assert torch.equal(whole, batch.positions)
        assert sorted(int(i) for part in parts for share in part for i in share.positions) == list(range(size))
        if seed is None:
            assert torch.cat([batch.positions for batch in alone]).tolist() == list(range(size))


def test_a_share_may_be_empty_and_is_a_batch_nevertheless() -> None:
    first, second = shares(9, 4, 0, 2)
    assert [len(share.positions) for share in first] == [2, 2, 1]
    assert [len(share.positions) for share in second] == [2, 2, 0]
    x, y = ArrayDataset(torch.rand(9, 3), torch.arange(9))[second[-1]]
    assert (x.shape, y.shape) == ((0, 3), (0,))


def test_the_process_is_that_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = shares(10, 4, 5, 1)
    for name, value in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    taken = list(BatchSampler(10, 4, 5))
    assert [share.positions.tolist() for share in taken] == [batch.positions[2::3].tolist() for batch in expected]


def test_the_order_does_not_depend_on_what_else_is_random_or_asked_for() -> None:
    sampler, other = BatchSampler(50, 8, 3), BatchSampler(50, 8, 3)
    first = order(sampler)
    torch.manual_seed(1)
    np.random.seed(1)
    next(iter(other))  # a pass that breaks off
    other.set_epoch(0)
    assert order(other) == first
    assert order(BatchSampler(50, 50, 3)) == first, "the batch size only cuts the order into pieces"
    assert order(BatchSampler(50, 8, 4)) != first


def test_a_pass_may_begin_in_the_middle_and_the_next_does_not() -> None:
    (whole,) = shares(10, 3, 2, 1)
    for start in range(5):
        (rest,) = shares(10, 3, 2, 1, start=start)
        assert [share.positions.tolist() for share in rest] == [share.positions.tolist() for share in whole[start:]]
    sampler = BatchSampler(10, 3, 2)
    sampler.start = 2
    assert [len(list(sampler)) for _ in range(3)] == [2, 4, 4]
    sampler = BatchSampler(10, 3, 2)
    sampler.start = 2
    sampler.set_epoch(0)  # as Lightning does before it goes on inside an epoch
    assert len(list(sampler)) == 2
    sampler.start = 2
    sampler.set_epoch(5)
    assert len(list(sampler)) == 4


def loader_of(num_workers: int = 0, batch_size: int = 3) -> Loader:
    dataset = ArrayDataset(torch.arange(20.0).view(10, 2), torch.arange(10))
    return Loader(dataset, batch_size, sampler=BatchSampler(10, batch_size, 6), num_workers=num_workers)


def drawn(loader: Loader, batches: int | None = None) -> list[list[int]]:
    return [y.tolist() for _, y in itertools.islice(loader, batches)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_goes_on_from_its_state(num_workers: int) -> None:
    reference = loader_of()
    epochs = [drawn(reference) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    loader, resumed = loader_of(num_workers), loader_of(num_workers)
    for epoch in (0, 1):
        iterator = iter(loader)
        for done in range(1, 5):
            next(iterator)
            state = loader.state_dict()
            assert state == {"epoch": epoch, "batches": done}
            resumed.load_state_dict(state)
            assert drawn(resumed) == (epochs[epoch][done:] or epochs[epoch + 1])
            if done < 4:
                assert drawn(resumed) == epochs[epoch + 1]
        assert list(iterator) == []
        assert loader.state_dict() == {"epoch": epoch, "batches": 4}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_state_says_what_was_handed_out_not_what_was_fetched(num_workers: int) -> None:
    loader = loader_of(num_workers)
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
    iterator = iter(loader)
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
    next(iterator)
    assert loader.state_dict() == {"epoch": 0, "batches": 1}
    list(iterator)
    assert loader.state_dict() == {"epoch": 0, "batches": 4}
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 1, "batches": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loop_that_breaks_off_is_an_epoch(num_workers: int) -> None:
    reference = loader_of()
    epochs = [drawn(reference) for _ in range(3)]
    loader = loader_of(num_workers)
    assert drawn(loader, 2) == epochs[0][:2]
    assert drawn(loader, 1) == epochs[1][:1]
    assert drawn(loader) == epochs[2]


def test_a_finished_pass_is_followed_by_the_next_epoch() -> None:
    reference = loader_of()
    epochs = [drawn(reference) for _ in range(2)]
    resumed = loader_of()
    resumed.load_state_dict({"epoch": 0, "batches": 4})
    assert resumed.state_dict() == {"epoch": 1, "batches": 0}
    assert drawn(resumed) == epochs[1]


@pytest.mark.parametrize("bare", [True, False])
def test_overfit_batches_are_the_same_ones_in_order(tmp_path: Path, bare: bool) -> None:
    model, module = Recorder(), Numbered(batch_size=4, val_fraction=0)
    run = trainer(tmp_path, epochs=3, overfit_batches=2)
    if bare:
        module.setup("fit")
        run.fit(model, module.train_dataloader())
    else:
        run.fit(model, module)
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


@pytest.mark.parametrize("bare", [True, False])
def test_part_of_an_epoch(tmp_path: Path, bare: bool) -> None:
    whole, part = Recorder(), Recorder()
    trainer(tmp_path, epochs=3).fit(whole, Numbered(batch_size=4, val_fraction=0))
    module = Numbered(batch_size=4, val_fraction=0)
    run = trainer(tmp_path, epochs=3, limit_train_batches=2)
    if bare:
        module.setup("fit")
        run.fit(part, module.train_dataloader())
    else:
        run.fit(part, module)
    assert part.seen == [batch for i, batch in enumerate(whole.seen) if i % 3 < 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_predicts_in_order(tmp_path: Path, num_workers: int) -> None:
    dataset = ArrayDataset(torch.arange(10.0)[:, None], torch.arange(10))
    batches = trainer(tmp_path, epochs=1).predict(Recorder(), Loader(dataset, 4, num_workers=num_workers))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


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


# Data that stay on the device.


class _Strategy:
    root_device = torch.device("meta")  # a device that every machine has


class _Trainer:
    strategy = _Strategy()


def on_meta(**options: Any) -> Numbered:
    module = Numbered(**options)
    module.trainer = _Trainer()  # type: ignore[assignment]
    return module


def test_resident_data_are_moved_once_and_shared_by_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    to = Tensor.to

    def spy(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        moved.append(tensor.shape)
        return to(tensor, *arguments, **options)

    module = on_meta(val_fraction=0.2, resident="device", num_workers=1)
    module.setup("fit")
    monkeypatch.setattr(Tensor, "to", spy)
    train, val = module.train_dataloader().dataset, module.val_dataloader().dataset
    again = module.train_dataloader().dataset
    assert moved.count(torch.Size([10, 2])) == 1
    assert train.inputs is val.inputs is again.inputs
    assert train.targets is val.targets
    assert (train.inputs.device.type, train.rows.device.type, val.rows.device.type) == ("meta",) * 3
    x, y = train[Share(torch.tensor([3, 1]), 0)]
    assert (x.device.type, x.shape, y.device.type) == ("meta", (2, 2), "meta")
    loader = module.train_dataloader()
    assert (loader.num_workers, loader.pin_memory) == (0, False)
    assert next(iter(loader))[0].device.type == "meta"


@pytest.mark.parametrize("resident", ["cpu", "auto"])
def test_data_stay_where_they_are_unless_told_otherwise(resident: str) -> None:
    for module in (on_meta(resident=resident, num_workers=1), Numbered(resident=resident, num_workers=1)):
        loader = module.train_dataloader()
        assert loader.dataset.inputs is module._arrays["train"].inputs
        assert (loader.num_workers, loader.pin_memory) == (1, False)


def test_on_a_cpu_resident_data_are_those_in_memory() -> None:
    module = Numbered(resident="device")
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert module.train_dataloader().dataset.inputs is module._arrays["train"].inputs
    assert module._copies == {}


class _Gpu:
    strategy = type("Strategy", (), {"root_device": torch.device("cuda")})()


def test_memory_is_pinned_for_what_a_gpu_takes_batch_by_batch() -> None:
    module = Numbered(resident="cpu")
    module.trainer = _Gpu()  # type: ignore[assignment]
    assert module.train_dataloader().pin_memory
    assert not Numbered(resident="cpu").train_dataloader().pin_memory


@pytest.mark.parametrize(("free", "resides"), [(159, False), (160, True)])
def test_auto_takes_at_most_half_of_the_free_memory(free: int, resides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    inputs = torch.zeros(10, 2)  # 80 bytes
    assert Numbered(resident="auto")._resides(inputs, torch.device("cuda")) == resides
    assert Numbered(resident="device")._resides(inputs, torch.device("cuda"))
    assert not Numbered(resident="cpu")._resides(inputs, torch.device("cuda"))


def test_data_that_do_not_fit_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    module = on_meta(resident="device")
    module.setup("fit")
    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(
        ValueError, match=r"resident='device': 0\.00 GB of data do not fit on meta; use resident='auto'"
    ):
        module.train_dataloader()


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
        ({"resident": "gpu"}, ValueError, "resident must be 'auto', 'cpu' or 'device', got 'gpu'"),
        ({"flip": True}, ValueError, "flip and crop_padding are for images, and these data are features"),
        ({"crop_padding": 2}, ValueError, "flip and crop_padding are for images"),
        ({"crop_padding": -1}, ValueError, "crop_padding must be an integer of at least 0, got -1"),
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
