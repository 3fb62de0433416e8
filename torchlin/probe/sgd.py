"""The other way to a head: many heads trained by SGD at once, the best on validation samples trained again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from torchlin.bank import HeadBank
from torchlin.data.loading import ArrayDataset, BatchSampler, Loader
from torchlin.features import FeatureMatrix
from torchlin.heads import LinearHead, Standardization
from torchlin.losses import Loss, trained_spec
from torchlin.penalties import Penalty

# DINOv2's grid, for batches of 256 samples.
_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_RATES_ARE_FOR = 256


@dataclass(frozen=True)
class Recipe:
    """How a bank of heads is trained: SGD with momentum, each learning rate falling to 0 like a cosine.

    By default the linear evaluation of DINOv2 (Oquab et al., TMLR 2024), 13 learning rates, 10 epochs of batches of
    128, momentum 0.9 and no penalty, except that features are standardised.

    Attributes:
        learning_rates: for batches of 256 samples; multiplied by batch_size/256.
        strengths: λ; every learning rate is tried with every one. 0 is no penalty.
        epochs: passes over the training samples.
        batch_size: samples per step.
        momentum: of SGD.
        standardize: whether features are (x − μ)/σ.
        seed: of the order of the samples.
    """

    learning_rates: Sequence[float] = _RATES
    strengths: Sequence[float] = (0.0,)
    epochs: int = 10
    batch_size: int = 128
    momentum: float = 0.9
    standardize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates are positive numbers, got {list(self.learning_rates)}")
        if not self.strengths or not all(s >= 0 for s in self.strengths):
            raise ValueError(f"strengths are numbers ≥ 0, got {list(self.strengths)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size are at least 1, got {self.epochs} and {self.batch_size}")


class Found(NamedTuple):
    """The head that was best on the validation samples, trained again on all.

    Attributes:
        head: on raw features.
        standardization: that was folded into it.
        penalty: λR, or None.
        chosen: which, in words.
        val_accuracy: of the head that was trained without the validation samples.
        rows: accuracy and loss on the validation samples for each head of the bank.
    """

    head: LinearHead
    standardization: Standardization
    penalty: Penalty | None
    chosen: str
    val_accuracy: float
    rows: list[dict[str, float]]


class BankTraining(LightningModule):
    """A `HeadBank` in Lightning's hands: SGD, one cosine for all heads."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, bank: HeadBank, loss: Loss, standardization: Standardization, momentum: float, steps: int, window: int
    ) -> None:
        super().__init__()
        self.bank, self.loss = bank, loss
        self.momentum, self.steps, self.window = momentum, steps, window
        self.register_buffer("mean", standardization.mean)
        self.register_buffer("std", standardization.std)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        x = (x.float() - self.mean).div_(self.std)
        total: Tensor = self.bank.losses(x, y, self.loss).sum()
        return total

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.bank.parameters(), lr=1.0, momentum=self.momentum)
        self.bank.attach(optimizer, window=self.window)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Steps(Callback):
    def __init__(self, what: str, total: int, report: Callable[[str, int, int], None] | None) -> None:
        self.what, self.total, self.report = what, total, report

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self.report is not None and (step % 50 == 0 or step == self.total):
            self.report(self.what, step, self.total)


def train_bank(
    x: Tensor, y: Tensor, held: Tensor, loss: Loss, penalty: Callable[[float], Penalty], recipe: Recipe,
    num_classes: int, report: Callable[[str, int, int], None] | None = None,
) -> Found:  # fmt: skip
    """Train one head for each learning rate and strength without the held-out rows; train the best again on all rows.

    The number of steps is the same both times, as its learning rate was chosen for.

    Raises:
        ValueError: every head diverged.
    """
    kept = torch.ones(len(y), dtype=torch.bool).index_fill(0, held, False).nonzero().flatten()
    scale = recipe.batch_size / _RATES_ARE_FOR
    grid = [(rate * scale, strength) for strength in recipe.strengths for rate in recipe.learning_rates]
    bank, standardization = _train(x, y, kept, loss, penalty, recipe, grid, num_classes, "heads", report)
    accuracy, values = _validate(bank, x, y, held, loss, standardization)
    lost = len(bank.diverged)  # asked first: weights that became infinite at the last steps count too
    alive = bank.alive
    best = int(torch.where(alive, accuracy, -1.0).argmax())
    rate, strength = grid[best]
    everything = torch.arange(len(y))
    again, moments = _train(x, y, everything, loss, penalty, recipe, [grid[best]], num_classes, "head", report)
    rows = [
        {
            "epoch": float(i), "learning_rate": r, "strength": s, "val_accuracy": float(accuracy[i]),
            "val_loss": float(values[i]), "diverged": float(not alive[i]),
        }
        for i, (r, s) in enumerate(grid)
    ]  # fmt: skip
    told = f"learning rate {rate:.3g}" + (f", strength {strength:.3g}" if len(recipe.strengths) > 1 else "")
    told += f", {best + 1} of {len(grid)} heads" + (f", of which {lost} diverged" if lost else "")
    return Found(
        _folded(again.head(0), moments, loss), moments, penalty(strength) if strength > 0 else None, told,
        float(accuracy[best]), rows,
    )  # fmt: skip


def _train(
    x: Tensor, y: Tensor, rows: Tensor, loss: Loss, penalty: Callable[[float], Penalty], recipe: Recipe,
    grid: Sequence[tuple[float, float]], num_classes: int, what: str, report: Callable[[str, int, int], None] | None,
) -> tuple[HeadBank, Standardization]:  # fmt: skip
    weight = None if len(rows) == len(y) else torch.zeros(len(y), dtype=torch.float64).index_fill(0, rows, 1.0)
    moments = FeatureMatrix.of(x, standardize=recipe.standardize, weight=weight).standardization
    standardization = Standardization(*(t.float() for t in moments))
    bank = HeadBank(
        x.shape[1], loss.outputs(num_classes), lr=[rate for rate, _ in grid],
        penalty=[penalty(strength) if strength > 0 else None for _, strength in grid],
    )  # fmt: skip
    dataset = ArrayDataset(x, y, rows)
    loader = Loader(
        dataset, recipe.batch_size, sampler=BatchSampler(len(dataset), recipe.batch_size, recipe.seed)
    )  # fmt: skip
    steps = recipe.epochs * len(loader)
    training = BankTraining(bank, loss, standardization, recipe.momentum, steps, window=len(loader))
    trainer = Trainer(
        max_epochs=recipe.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[_Steps(what, steps, report)],
    )  # fmt: skip
    try:
        trainer.fit(training, loader)
    except FloatingPointError as error:
        raise ValueError(f"{error}: give smaller learning_rates") from None
    return bank.cpu(), standardization


@torch.no_grad()
def _validate(
    bank: HeadBank, x: Tensor, y: Tensor, held: Tensor, loss: Loss, standardization: Standardization
) -> tuple[Tensor, Tensor]:
    """Accuracy and mean loss of each head on the held-out rows, (H,) each."""
    right = torch.zeros(len(bank), dtype=torch.float64)
    total = torch.zeros(len(bank), dtype=torch.float64)
    for rows in held.split(4096):
        scores = bank((x[rows].float() - standardization.mean) / standardization.std)
        for h, z in enumerate(scores):
            right[h] += (loss.predict(z) == y[rows]).sum()
            total[h] += loss.value(z.double(), y[rows]).sum()
    return right / len(held), total / len(held)


@torch.no_grad()
def _folded(head: LinearHead, standardization: Standardization, loss: Loss) -> LinearHead:
    """The head on raw features."""
    mean, std = standardization
    raw = head.weight / std
    head.bias.sub_(raw @ mean)
    head.weight.copy_(raw)
    head.info = {"loss": trained_spec(loss)}
    return head
