"""A progress bar that costs nothing."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn

_SECONDS = 0.1


class ProgressBar(RichProgressBar):
    """Callback: Lightning's rich progress bar, drawn ten times a second instead of after every step, which would take a
    fifth of the time of a small step. Without the speed, so that a line and its metrics fit into 80 columns.
    """

    _drawn = 0.0

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.is_disabled and (self._due() or trainer.is_last_batch):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_disabled:  # in other processes than the first
            return
        last = batch_idx + 1 == self.total_val_batches_current_dataloader
        if self._due() or last or trainer.sanity_checking:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_disabled:
            return
        if self._due() or batch_idx + 1 == self.total_test_batches_current_dataloader:
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._drawn < _SECONDS:
            return False
        self._drawn = now
        return True
