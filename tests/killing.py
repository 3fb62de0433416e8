"""A callback that kills its own process, as the system does: no handler runs, nothing is flushed, no file is closed.

The point is read from the variable KILL, so that the run which goes on, with the same configuration, survives it:
"batch_end:1:3" is the end of batch 3 of epoch 1. Callbacks run before the run folder's.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from torchlin import RunFolder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    def __init__(self) -> None:
        name, *numbers = os.environ.get("KILL", "never").split(":")
        self.point = (name, *map(int, numbers))
        if self.point[0] == "writing":
            self._die_writing(self.point[1])

    def _at(self, *point: object) -> None:
        if point == self.point:
            die()

    @staticmethod
    def _die_writing(number: int) -> None:
        """Die when checkpoint `number` is half in its place, as happens where /tmp is on another disk."""
        written: list[object] = []

        def move(source: str, target: str, *_: Any) -> None:
            if len(written) == number:
                content = Path(source).read_bytes()
                Path(target).write_bytes(content[: len(content) // 2])
                die()
            written.append(shutil.copy2(source, target))
            os.unlink(source)

        shutil.move = move  # type: ignore[assignment]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.point[0] == "before_checkpoint":
            write = RunFolder._checkpoint

            def checkpoint(folder: RunFolder, trainer: Trainer) -> None:
                if len(folder.rows) == self.point[1] + 1:
                    die()
                write(folder, trainer)

            RunFolder._checkpoint = checkpoint  # type: ignore[method-assign]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("sanity_check")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("train_start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at("batch_start", trainer.current_epoch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at("batch_end", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._at("validation", trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("epoch_end", trainer.current_epoch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("fit_end")
