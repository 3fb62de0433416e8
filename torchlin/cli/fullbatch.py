"""What `solve` and `probe` share: fit's options without a training loop."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Trainer

from torchlin.cli.training import TorchlinCLI
from torchlin.folder import check_free
from torchlin.penalties import L2, PENALTY_REGISTRY, Penalty

# What `fit` needs and a solver does not.
_IGNORED = ("model.optimizer", "model.lr", "model.momentum", "model.schedule")


class FullBatchCLI(TorchlinCLI):
    """fit's options, of which the optimiser's and the trainer's have no effect."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self.options()
        if options.run is not None:
            check_free(options.run)  # before the data are read, which may take long
        device = options.device
        if device is not None:
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # There is nothing to train with it, but Lightning's command line wants one.
        return self.trainer_class(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
        )

    def ignored(self) -> list[str]:
        """The options that were set and have no effect here."""
        defaults = self._parser(self.subcommand).get_defaults()
        keys = [*_IGNORED, *(f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters)]
        options = self.options()
        set_by_user = [k for k in keys if k in options and options[k] != defaults.get(k)]
        size = inspect.signature(type(self.datamodule)).parameters.get("batch_size")
        if size is not None and getattr(self.datamodule, "batch_size", size.default) != size.default:
            set_by_user.append("data.batch_size")
        return set_by_user

    def family(self, strength: float) -> Penalty:
        """The penalty that was asked for, or L2, at another strength."""
        given = self.model.penalty
        if given is None:
            return L2(strength)
        return PENALTY_REGISTRY.make({**PENALTY_REGISTRY.spec(given), "strength": strength})
