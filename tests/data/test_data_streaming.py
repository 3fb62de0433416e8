"""Images that are decoded when they are asked for: the same run as from the store, with nothing kept."""

from __future__ import annotations

import multiprocessing
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from training import quiet_trainer, write_photos

from torchlin import LinearClassifier, RunFolder
from torchlin.cli import main
from torchlin.data import DataError, ImageFolderDataModule, streaming
from torchlin.data.decoding import can_fork
from torchlin.data.images import PixelFormat
from torchlin.data.loading import ArrayDataset
from torchlin.data.streaming import FileImages, check_files

Grow = Callable[[Mapping[str, int]], Path]

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", {"train/cat": 20, "train/dog": 26, "test/cat": 4, "test/dog": 5}, (8, 7))


def fitted(root: Path, **options: Any) -> tuple[LinearClassifier, dict[str, float]]:
    data = ImageFolderDataModule(str(root), batch_size=7, seed=3, **options)
    model = LinearClassifier(data.in_features, data.num_classes, penalty={"name": "l1", "strength": 0.001})
    trainer = quiet_trainer(2)
    trainer.fit(model, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(model, data, verbose=False)
    return model, {**logged, **tested}


@pytest.mark.parametrize("options", [{}, {"flip": True, "crop_padding": 2}, {"image_size": 5}, {"color": "gray"}])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_or_cached_the_weights_are_the_same(photos: Path, options: dict[str, Any], num_workers: int) -> None:
    cached, expected = fitted(photos, **options)
    streamed, metrics = fitted(photos, cache=False, num_workers=num_workers, **options)
    for name, parameter in cached.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], parameter), name
    assert metrics == expected
    assert float(cached.to_head().weight.abs().max()) > 0


@pytest.mark.skipif(not can_fork(), reason="no forked processes here")
def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent(photos: Path) -> None:
    images, expected = pixels_of(photos)
    images._threads = 2
    images.index_select(0, torch.arange(4))  # starts the threads
    loader = DataLoader(ArrayDataset(images, torch.zeros(55)), batch_size=11, num_workers=1, timeout=60)
    assert torch.equal(torch.cat([x for x, _ in loader]), expected)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(images.index_select(0, torch.arange(9)).numpy()), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(torch.from_numpy(results.get()), expected[:9])


def pixels_of(photos: Path) -> tuple[FileImages, Tensor]:
    paths = sorted(str(path) for path in photos.rglob("*.png"))
    expected = torch.stack([torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) for path in paths])
    return FileImages(paths, PixelFormat((3, 7, 8), "rgb")), expected


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_rows_are_decoded_in_the_order_asked_for(photos: Path, threads: int) -> None:
    images, expected = pixels_of(photos)
    images._threads = threads
    assert images.shape == expected.shape == (55, 3, 7, 8)
    assert (images.dtype, images.device) == (torch.uint8, torch.device("cpu"))
    for index in (
        torch.tensor([3, 3, 50, 0]),
        torch.tensor([], dtype=torch.int64),
        torch.arange(55),
        torch.tensor([7]),
    ):
        out = images.index_select(0, index)
        assert out.dtype == torch.uint8
        assert torch.equal(out, expected[index])
    assert torch.equal(torch.cat(list(ArrayDataset(images, torch.zeros(55)).blocks())), expected)


def test_a_large_request_takes_the_parallel_way(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, expected = pixels_of(photos)
    monkeypatch.setattr(streaming, "_MANY", 10)
    index = torch.arange(54, -1, -1)
    assert torch.equal(images.index_select(0, index), expected[index])


def tensors_in(value: object, depth: int = 4) -> list[object]:
    if isinstance(value, (Tensor, np.ndarray)):
        return [value]
    if depth == 0 or isinstance(value, (str, bytes)):
        return []
    if isinstance(value, Mapping):
        inside: list[object] = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return [found for item in inside for found in tensors_in(item, depth - 1)]


def test_no_pixels_are_kept(photos: Path) -> None:
    images, expected = pixels_of(photos)
    images._threads = 2
    for _ in range(2):
        assert torch.equal(images.index_select(0, torch.arange(55)), expected)
    assert tensors_in(vars(images)) == []
    data = ImageFolderDataModule(str(photos), cache=False, batch_size=7)
    data.setup("fit")
    assert data.standardization is not None
    list(data.train_dataloader())
    for split in ("train", "test"):
        inputs, targets = data._arrays[split]
        assert isinstance(inputs, FileImages)
        assert tensors_in(vars(inputs)) == []
        assert targets.dim() == 1


def test_nothing_is_written(photos: Path, cache: Path) -> None:
    fitted(photos, cache=False)
    assert list(cache.iterdir()) == []


def test_it_goes_into_worker_processes(photos: Path) -> None:
    images, expected = pixels_of(photos)
    images._threads = 2
    images.index_select(0, torch.arange(4))
    assert images._pool is not None
    copy = pickle.loads(pickle.dumps(images))
    assert copy._pool is None
    assert torch.equal(copy.index_select(0, torch.arange(55)), expected)
    data = ImageFolderDataModule(str(photos), cache=False, batch_size=7, num_workers=2)
    alone = ImageFolderDataModule(str(photos), cache=False, batch_size=7)
    for (x, y), (u, v) in zip(data.train_dataloader(), alone.train_dataloader(), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


class Damage(Callback):
    """Spoil a training file between two epochs."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.path.write_bytes(self.content)


def another_size(folder: Path) -> bytes:
    Image.new("RGB", (3, 3)).save(folder / "other.png")
    return (folder / "other.png").read_bytes()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("what", ["empty", "text", "size"])
def test_a_file_that_goes_bad_during_training_is_named(
    photos: Path, tmp_path: Path, what: str, num_workers: int
) -> None:
    content = {"empty": b"", "text": b"no image", "size": another_size(tmp_path)}[what]
    path = photos / "train" / "dog" / "3.png"
    data = ImageFolderDataModule(str(photos), cache=False, val_fraction=0, batch_size=7, num_workers=num_workers)
    model = LinearClassifier(data.in_features, data.num_classes)
    trainer = quiet_trainer(3, [Damage(path, content), RunFolder(tmp_path / "run")])
    with pytest.raises(DataError, match=re.escape(str(path))):
        trainer.fit(model, data)
    assert trainer.current_epoch == 1
    assert (tmp_path / "run" / "checkpoint.ckpt").is_file(), "and the run can go on when the file is back"


def test_a_file_that_is_gone_is_named(photos: Path) -> None:
    data = ImageFolderDataModule(str(photos), cache=False, val_fraction=0)
    data.setup("fit")
    path = photos / "train" / "cat" / "7.png"
    path.unlink()
    with pytest.raises(DataError, match=re.escape(str(path))):
        list(data.train_dataloader())


def spoil(root: Path) -> list[Path]:
    bad = [root / name for name in ("test/dog/0.png", "train/cat/1.png", "train/dog/19.png")]
    for path in bad:
        path.write_bytes(b"")
    return bad


def test_bad_files_of_all_splits_stop_the_run_before_it_trains(photos: Path, tmp_path: Path) -> None:
    bad = spoil(photos)
    data = ImageFolderDataModule(str(photos), cache=False)
    model = LinearClassifier(data.in_features, data.num_classes)
    with pytest.raises(DataError, match="3 of 55 images cannot be read") as caught:
        quiet_trainer(2, [RunFolder(tmp_path / "run")]).fit(model, data)
    for path in bad:
        assert str(path) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_files_are_left_out_if_asked_for(photos: Path) -> None:
    bad = spoil(photos)
    cached = ImageFolderDataModule(str(photos), on_error="skip", batch_size=7)
    streamed = ImageFolderDataModule(str(photos), on_error="skip", batch_size=7, cache=False)
    for data in (cached, streamed):
        with pytest.warns(UserWarning, match="left out 3 of 55 images"):
            data.setup("fit")
        assert data.skipped_files == [str(path.relative_to(photos)) for path in (bad[1], bad[2], bad[0])]
        assert data.sizes == {"train": 39, "val": 5, "test": 8}
    for (x, y), (u, v) in zip(cached.train_dataloader(), streamed.train_dataloader(), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_check_files_finds_the_bad_ones_and_another_size(photos: Path) -> None:
    bad = spoil(photos)
    paths = sorted(str(path) for path in photos.rglob("*.png"))
    found = check_files(paths, PixelFormat((3, 7, 8), "rgb"))
    assert [paths[file.place] for file in found] == [str(path) for path in bad]
    Image.new("RGB", (9, 9)).save(photos / "train" / "cat" / "9.png")
    with pytest.raises(DataError, match=r"9\.png: image is 9×9 pixels"):
        check_files(paths, PixelFormat((3, 7, 8), "rgb"))


def test_a_device_cannot_keep_what_is_not_kept(photos: Path) -> None:
    with pytest.raises(ValueError, match="resident='device' needs cache=True"):
        ImageFolderDataModule(str(photos), cache=False, resident="device")
    # "auto" streams to any device.
    data = ImageFolderDataModule(str(photos), cache=False, resident="auto")
    data.trainer = type("T", (), {"strategy": type("S", (), {"root_device": torch.device("meta")})()})()
    assert isinstance(data.train_dataloader().dataset.inputs, FileImages)
    assert data._copies == {}


def test_on_the_command_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--data.root={photos}", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    for run, cache in (("cached", "true"), ("streamed", "false")):
        assert main(["fit", *options, "--trainer.accelerator=cpu", f"--data.cache={cache}", f"--run={run}"]) == 0
    one, other = ((tmp_path / run / "head.safetensors").read_bytes() for run in ("cached", "streamed"))
    assert one == other
