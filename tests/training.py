"""What the tests of training share: small data, a quiet trainer, folders of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torchlin import Standardization

RUN_FILES = {
    "checkpoint.ckpt",
    "config.yaml",
    "confusion.png",
    "curves.png",
    "head.json",
    "head.safetensors",
    "metrics.csv",
    "templates.png",
}


def quiet_trainer(epochs: int = 2, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    given: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    if not callbacks:
        given.setdefault("enable_checkpointing", False)
    return Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), **given)


def blobs(n: int, classes: int, features: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Clouds around one point per class (the same points for every seed), off-centre and of unequal scales."""
    centres = 3 * torch.randn(classes, features, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    noise = torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.arange(n) % classes
    x = (centres[y] + noise) * torch.linspace(0.5, 3, features, dtype=torch.float64) + 2
    return [x.to(dtype), y]


class Blobs(LightningDataModule):
    """A data module as a user would write one: loaders and nothing else."""

    def __init__(self, classes: int = 3, batch_size: int = 16, n: int = 72, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val, self.test = (blobs(m, classes, 5, s, dtype) for m, s in ((n, 0), (25, 1), (31, 2)))

    def _loader(self, split: list[Tensor]) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*split), self.batch_size)

    def train_dataloader(self) -> Any:
        return self._loader(self.train)

    def val_dataloader(self) -> Any:
        return self._loader(self.val)

    def test_dataloader(self) -> Any:
        return self._loader(self.test)


class KnownBlobs(Blobs):
    """The same, with what torchlin asks a data module for."""

    @property
    def standardization(self) -> Standardization:
        return Standardization(self.train[0].mean(0).float(), self.train[0].std(0, correction=0).float())

    @property
    def class_counts(self) -> Tensor:
        return torch.bincount(self.train[1])


class Raise(Callback):
    """Raise an error after a batch."""

    def __init__(self, error: BaseException, epoch: int, batch: int) -> None:
        self.error = error
        self.at = (epoch, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise self.error


def write_photos(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (4, 3)) -> Path:
    """{"train/cat": 5} puts five colour pictures (width × height) into root/train/cat; classes differ in brightness."""
    rng = np.random.default_rng(0)
    names = sorted({Path(name).name for name in counts})
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        bright = 200 * names.index(folder.name) // len(names)
        for i in range(count):
            pixels = rng.integers(bright, bright + 56, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write_table(path: Path, counts: Sequence[int] = (30, 30), features: int = 3, names: Sequence[str] = ()) -> Path:
    """A .csv with columns f0, f1, … and target: `counts` rows of each class, named if there are names."""
    rng = np.random.default_rng(0)
    lines = [",".join([*(f"f{j}" for j in range(features)), "target"])]
    for label, count in enumerate(counts):
        for row in rng.normal(3 * label, 1, (count, features)):
            lines.append(",".join([*(f"{value:.4f}" for value in row), names[label] if names else str(label)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
