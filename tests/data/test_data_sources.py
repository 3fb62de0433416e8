"""The digits, and CIFAR in small local files."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from torchlin.data import CIFAR10DataModule, CIFAR100DataModule, DataError, DigitsDataModule


def test_digits() -> None:
    module = DigitsDataModule()
    assert (module.name, module.num_classes, module.in_features) == ("digits", 10, 64)
    assert module.class_names == list("0123456789")
    assert json.loads(json.dumps(module.input_info)) == {
        "kind": "pixels",
        "shape": [1, 8, 8],
        "color": "gray",
        "image_size": None,
        "resize": None,
    }
    module.setup("fit")
    assert module.sizes == {"train": 1293, "val": 144, "test": 360}
    assert module.class_counts.sum() == 1293
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((128, 1, 8, 8), torch.uint8, (128,), torch.int64)


def test_digits_are_all_there_and_labelled_right() -> None:
    module = DigitsDataModule(batch_size=5000)
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    samples = [sample for loader in loaders for batch in loader for sample in zip(*batch, strict=True)]
    found = {(bytes(image.numpy()), int(label)) for image, label in samples}
    assert len(samples) == 1797
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    assert found == {(image.tobytes(), int(label)) for image, label in zip(pixels, digits.target, strict=True)}


def test_digits_test_split_does_not_depend_on_the_seed() -> None:
    tests = [next(iter(DigitsDataModule(seed=seed, batch_size=999).test_dataloader()))[0] for seed in (0, 5)]
    assert torch.equal(*tests)


def write_batch(path: Path, labels_key: str, labels: list[int], seed: int) -> list[str]:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": pixels, labels_key: labels}))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


def write_cifar(root: Path, source: type, key: str, labels: list[int], patch: pytest.MonkeyPatch) -> None:
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    for kind, seed in (("train_list", 0), ("test_list", 100)):
        names = [name for name, _ in getattr(source, kind)]
        sums = [write_batch(folder / name, key, labels, seed + i) for i, name in enumerate(names)]
        patch.setattr(source, kind, sums)
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: ["name"]}))
    checksum = hashlib.md5(meta.read_bytes()).hexdigest()
    patch.setattr(source, "meta", {**source.meta, "md5": checksum})


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, "labels", [0, 1, 2, 9] * 5, monkeypatch)
    module = CIFAR10DataModule(str(tmp_path), val_fraction=0.2)
    assert (module.name, module.num_classes, module.in_features) == ("cifar10", 10, 3072)
    assert module.class_names[:3] + module.class_names[-1:] == ["airplane", "automobile", "bird", "truck"]
    assert module.input_info["shape"] == [3, 32, 32]
    module.setup("fit")
    assert module.sizes == {"train": 80, "val": 20, "test": 20}
    assert module.class_counts.tolist() == [20, 20, 20, 0, 0, 0, 0, 0, 0, 20]
    x, y = next(iter(module.test_dataloader()))
    stored = np.random.default_rng(100).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert torch.equal(x, torch.from_numpy(stored.reshape(20, 3, 32, 32)))
    assert y.tolist() == [0, 1, 2, 9] * 5


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR100, "fine_labels", [0, 99, 50] * 4, monkeypatch)
    module = CIFAR100DataModule(root=str(tmp_path), val_fraction=0)
    assert (module.name, module.num_classes) == ("cifar100", 100)
    assert module.class_names == sorted(module.class_names)
    assert len(set(module.class_names)) == 100
    assert (module.class_names[0], module.class_names[99]) == ("apple", "worm")
    module.setup()
    assert module.sizes == {"train": 12, "val": 0, "test": 12}


def test_cifar_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CIFAR10DataModule(str(tmp_path / "nowhere"))
    module.prepare_data()
    with pytest.raises(DataError, match=r"nowhere/: the CIFAR10 files are missing .*download=True") as caught:
        module.setup("fit")
    assert "--data.download true" in str(caught.value)
    assert "cifar-10-batches-py/test_batch" in str(caught.value).replace("\\", "/")
    write_cifar(tmp_path, datasets.CIFAR10, "labels", [0, 1], monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="missing or damaged"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")


def test_cifar_download_is_opt_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(self: datasets.CIFAR10) -> None:
        calls.append(self.root)
        if len(calls) == 1:
            raise OSError("no network")
        write_cifar(tmp_path, datasets.CIFAR10, "labels", [0, 1] * 5, monkeypatch)
        monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: None)

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert calls == []
    module = CIFAR10DataModule(str(tmp_path), download=True)
    with pytest.raises(DataError, match=r"downloading https://.*cifar-10-python.tar.gz failed: no network"):
        module.prepare_data()
    module.prepare_data()
    assert module.class_counts.sum() == 45
