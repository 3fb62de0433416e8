"""Flips and crops: what is done to which image, and that it depends on (seed, epoch, position) alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from training import quiet_trainer, write_photos

from torchlin import LinearClassifier
from torchlin.cli import main
from torchlin.data import ArrayDataModule, FeaturesDataModule, ImageFolderDataModule
from torchlin.data.augment import Augmentation
from torchlin.data.base import Arrays, SplitName
from torchlin.data.loading import ArrayDataset, BatchSampler, Loader, Share

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")

RNG = np.random.default_rng(0)
SIZE = 40
SHAPES = [(3, 6, 6), (1, 5, 9), (2, 8, 3), (3, 1, 4), (1, 1, 1)]


def images_of(shape: tuple[int, int, int], n: int = SIZE) -> Tensor:
    return torch.from_numpy(RNG.integers(1, 256, (n, *shape), dtype=np.uint8))


def by_hand(image: np.ndarray, draw: Sequence[int], flip: bool, padding: int) -> np.ndarray:
    """One image at a time, by slices."""
    mirrored, down, right = draw
    _, height, width = image.shape
    if padding:
        padded = np.zeros((len(image), height + 2 * padding, width + 2 * padding), np.uint8)
        padded[:, padding : padding + height, padding : padding + width] = image
        image = padded[:, down : down + height, right : right + width]
    return image[:, :, ::-1] if flip and mirrored else image


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("flip", "padding"), [(True, 0), (False, 2), (True, 1), (True, 4), (False, 0)])
def test_flips_and_crops_are_those_of_slices(shape: tuple[int, int, int], flip: bool, padding: int) -> None:
    images, augmentation = images_of(shape), Augmentation(flip, padding, 3)
    before = images.clone()
    positions = torch.from_numpy(RNG.permutation(SIZE)[:17])
    out = augmentation(images[positions], positions, 2, SIZE)
    assert (out.dtype, out.shape) == (torch.uint8, (17, *shape))
    draws = augmentation._draws(2, SIZE)[positions].tolist()
    for image, draw, position in zip(out.numpy(), draws, positions, strict=True):
        np.testing.assert_array_equal(image, by_hand(before[position].numpy(), draw, flip, padding))
    assert torch.equal(images, before)
    if flip and shape[-1] > 1:
        assert not torch.equal(out, before[positions])


def test_an_empty_batch() -> None:
    out = Augmentation(True, 2, 0)(images_of((3, 4, 5))[:0], torch.empty(0, dtype=torch.int64), 0, SIZE)
    assert out.shape == (0, 3, 4, 5)


def test_every_treatment_is_equally_likely() -> None:
    n, padding = 20_000, 2
    draws = Augmentation(True, padding, 1)._draws(0, n).long()
    mirrored, down, right = draws.unbind(1)
    assert abs(float(mirrored.double().mean()) - 0.5) < 4 * 0.5 / n**0.5
    places = 2 * padding + 1
    counts = torch.bincount(down * places + right, minlength=places**2)
    assert len(counts) == places**2
    expected = n / places**2
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # χ² with 24 degrees of freedom: p = 6e-5
    together = torch.bincount(mirrored * places + down, minlength=2 * places).double()
    assert float(((together - n / 10) ** 2 / (n / 10)).sum()) < 35  # 9 degrees: p = 6e-5
    assert abs(float(torch.corrcoef(torch.stack([draws[:-1, 1], draws[1:, 1]]).double())[0, 1])) < 4 / n**0.5


def test_another_epoch_or_seed_is_another_draw_and_the_same_one_the_same() -> None:
    draws = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        draws[seed, epoch] = Augmentation(True, 4, seed)._draws(epoch, SIZE)
        again = Augmentation(True, 4, seed)
        again._draws(epoch + 1, SIZE)
        np.random.seed(1)
        torch.manual_seed(1)
        assert torch.equal(again._draws(epoch, SIZE), draws[seed, epoch])
    for one, other in itertools.combinations(draws.values(), 2):
        assert not torch.equal(one, other)


def passes(loader: Loader, epochs: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for epoch in range(epochs):
        for x, y in loader:
            yield epoch, x, y


def treated(batches: Iterator[tuple[int, Tensor, Tensor]]) -> dict[tuple[int, int], bytes]:
    """(epoch, position) → what the image became; the target is the position."""
    return {
        (epoch, int(label)): image.numpy().tobytes()
        for epoch, x, y in batches
        for image, label in zip(x, y, strict=True)
    }


def loader_of(batch_size: int, rank: int = 0, replicas: int = 1, workers: int = 0, rows: bool = False) -> Loader:
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (SIZE, 3, 5, 4), dtype=np.uint8))
    chosen = torch.arange(SIZE - 1, -1, -1) if rows else None
    dataset = ArrayDataset(images, torch.arange(SIZE), chosen, Augmentation(True, 2, 9))
    sampler = BatchSampler(SIZE, batch_size, 9)
    sampler.rank, sampler.num_replicas = rank, replicas
    return Loader(dataset, batch_size, sampler=sampler, num_workers=workers)


def test_an_image_is_treated_the_same_in_any_batch_process_and_worker() -> None:
    expected = treated(passes(loader_of(8), 2))
    assert len(expected) == 2 * SIZE
    assert sum(expected[0, i] != expected[1, i] for i in range(SIZE)) > SIZE / 2
    for batch_size in (1, 7, SIZE):
        assert treated(passes(loader_of(batch_size), 2)) == expected
    assert treated(passes(loader_of(8, workers=1), 2)) == expected
    for replicas in (2, 3):
        parts = [treated(passes(loader_of(7, rank, replicas), 2)) for rank in range(replicas)]
        assert sum(len(part) for part in parts) == len(expected)
        assert {key: value for part in parts for key, value in part.items()} == expected
    resumed = loader_of(8)
    resumed.load_state_dict({"epoch": 1, "batches": 3})
    rest = {(1, i): value for (_, i), value in treated(passes(resumed, 1)).items()}
    assert len(rest) == 16
    assert rest == {key: expected[key] for key in rest}


def test_the_position_is_that_in_the_data_set_not_in_the_array() -> None:
    """A split is a list of rows, and its images are numbered within it."""
    loader = loader_of(8, rows=True)
    dataset = loader.dataset
    assert isinstance(dataset, ArrayDataset)
    x, y = dataset[Share(torch.tensor([4, 0]), 1)]
    assert y.tolist() == [SIZE - 5, SIZE - 1]
    draws = dataset.augmentation._draws(1, SIZE)[[4, 0]].tolist()
    for image, label, draw in zip(x, y, draws, strict=True):
        np.testing.assert_array_equal(image.numpy(), by_hand(dataset.inputs[label].numpy(), draw, True, 2))


class Pictures(ArrayDataModule):
    def __init__(self, splits: Sequence[SplitName] = ("train", "test"), **options: Any) -> None:
        info = {"kind": "pixels", "shape": [3, 6, 5], "color": "rgb", "image_size": None}
        super().__init__("pictures", ["a", "b"], info, splits, **options)

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        rng = np.random.default_rng(2)
        pixels = torch.from_numpy(rng.integers(0, 256, (SIZE, 3, 6, 5), dtype=np.uint8))
        return {split: Arrays(pixels, torch.arange(SIZE) % 2) for split in splits}


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val", "test")])
def test_only_training_batches_are_augmented(splits: tuple[SplitName, ...]) -> None:
    plain, changed = Pictures(splits), Pictures(splits, flip=True, crop_padding=2)
    for name in ("val_dataloader", "test_dataloader"):
        for _ in range(2):
            for (x, _), (u, _) in zip(getattr(plain, name)(), getattr(changed, name)(), strict=True):
                assert torch.equal(x, u)
    assert torch.equal(plain.standardization.mean, changed.standardization.mean)
    assert torch.equal(plain.standardization.std, changed.standardization.std)
    assert plain.fingerprint == changed.fingerprint
    (x, y), (u, v) = (next(iter(module.train_dataloader())) for module in (plain, changed))
    assert torch.equal(y, v)
    assert (x != u).flatten(1).any(1).double().mean() > 0.5
    # A training sample that is asked for by its number is as it is on disk.
    train = changed.train_dataloader().dataset
    assert torch.equal(train[3][0], plain.train_dataloader().dataset[3][0])


def test_features_are_not_augmented(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", features=np.zeros((8, 2), np.float32), targets=np.arange(8) % 2)
    for options in ({"flip": True}, {"crop_padding": 1}):
        with pytest.raises((TypeError, ValueError), match=r"flip|crop_padding"):
            FeaturesDataModule(str(tmp_path / "table.npz"), **options)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(-1, ValueError, "crop_padding must be an integer of at least 0, got -1"), (1.5, TypeError, "crop_padding must")],
)
def test_bad_padding(tmp_path: Path, value: Any, error: type[Exception], message: str) -> None:
    root = write_photos(tmp_path / "photos", {"cat": 3, "dog": 3})
    with pytest.raises(error, match=message):
        ImageFolderDataModule(str(root), crop_padding=value)


def test_training_sees_the_augmented_images(tmp_path: Path) -> None:
    weights = []
    for options in ({}, {"flip": True}, {"flip": True}, {"crop_padding": 1}):
        module = Pictures(**options)
        model = LinearClassifier(module.in_features, 2)
        quiet_trainer(2).fit(model, module)
        weights.append(model.to_head().weight)
    assert torch.equal(weights[1], weights[2])
    for one, other in itertools.combinations((weights[0], weights[1], weights[3]), 2):
        assert not torch.equal(one, other)


def test_on_the_command_line_and_in_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_photos(tmp_path / "photos", {"cat": 8, "dog": 8}, (6, 5))
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", f"--data.root={root}", "--data.flip=true", "--data.crop_padding=2", "--run=a", *options]) == 0
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    data = config["data"]["init_args"]
    assert (data["flip"], data["crop_padding"], data["resident"]) == (True, 2, "auto")
    assert main(["fit", "--config", "a/config.yaml", "--run=b"]) == 0
    assert main(["fit", "--config", "a/config.yaml", "--data.flip=false", "--run=c"]) == 0
    heads = [(tmp_path / run / "head.safetensors").read_bytes() for run in "abc"]
    assert heads[0] == heads[1] != heads[2]
