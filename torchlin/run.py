"""`RunFolder`, the callback that writes a run folder."""

from __future__ import annotations

import inspect
import os
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from torchlin.classifier import LinearClassifier
from torchlin.folder import (
    CHECKPOINT,
    CONFIG,
    FILES,
    METRICS,
    MOST_CLASSES,
    Trained,
    add_metrics,
    begun,
    draw,
    find_run,
    finite,
    number_folder,
    open_folder,
    read_rows,
    rows_to_csv,
    write_result,
)
from torchlin.losses import LOSS_REGISTRY
from torchlin.penalties import PENALTY_REGISTRY
from torchlin.storage import load_head, replace_file

# Steps of the optimizer between two times that several processes ask whether a checkpoint is due.
_ASK_EVERY = 50


class RunFolder(Checkpoint):
    """Callback that keeps a run folder: `Trainer(callbacks=[torchlin.RunFolder("runs/mine")])`.

    When training starts, every `save_every` seconds and after each epoch it writes `checkpoint.ckpt`; after each epoch
    `metrics.csv`; when fitting ends, also by Ctrl-C, `head.safetensors`, `head.json`, and the pictures `templates.png`,
    `curves.png` and `confusion.png`. `trainer.test` with the same callback adds the test metrics. The head is that of
    the last step. A run that fails before its first epoch is complete leaves nothing behind, and neither does
    `fast_dev_run`.

    Args:
        path: the folder; None for runs/<data>-<loss>-<number>.
        resume: continue in a folder that a run was interrupted in (give its checkpoint.ckpt to `trainer.fit` too).
        config: text of config.yaml; the classifier's arguments if not given.
        save_every: seconds between two checkpoints inside an epoch; 0 for one after every step. A run that is killed
            loses no more, and ends with the weights that it would have ended with: the samples that are left of the
            epoch follow in their order, if the loader can go on inside an epoch (those of `torchlin.data` can).

    Raises:
        ValueError: the folder is not empty, or cannot be written to; save_every is negative.
        TypeError: the module has no head to write.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        config: str | None = None,
        save_every: float = 60.0,
    ) -> None:
        if not save_every >= 0:
            raise ValueError(f"save_every is a number of seconds, at least 0, got {save_every}")
        if resume and path is None:
            raise ValueError("resume=True needs the path of the run to resume")
        self.path = None if path is None else Path(path)
        self.resume = resume
        self.config = config
        self.save_every = save_every
        self._saved = 0.0  # when, by the monotonic clock
        self.rows: list[dict[str, float]] = []
        # Lightning asks the first checkpointing callback for this when it is told to test without a model.
        self.best_model_path = ""
        self._opened = False
        self._goes_on = False  # from a checkpoint
        self._fitted: tuple[object, object] = (None, None)
        self._restored = False
        self._validated = -1  # the last epoch with a validation
        self._val_metrics: dict[str, float] = {}  # that this one logged
        self._confusion: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or _dry(trainer):
            return
        if self._opened:
            if self._fitted[0] is not pl_module:
                raise ValueError(f"this RunFolder holds the run {self.path}: make a new one for another model")
            return
        if not isinstance(pl_module, Trained):
            raise TypeError(f"RunFolder writes the head of a LinearClassifier, got {type(pl_module).__name__}")
        _check_names(pl_module, _data(trainer))
        if trainer.is_global_zero:
            self.path = self._open(trainer, pl_module)
        self.path = trainer.strategy.broadcast(self.path)
        self._opened, self._fitted = True, (pl_module, _data(trainer))
        self._goes_on = self.resume and begun(cast("Path", self.path))

    def _open(self, trainer: Trainer, module: Trained) -> Path:
        if self.resume:
            folder = find_run(cast("Path", self.path))
            self.rows = read_rows(folder / METRICS)
            return folder
        config = self.config or _config(cast("LightningModule", module))
        if self.path is None:
            data = getattr(_data(trainer), "name", None) or "data"
            folder = number_folder(f"{data}-{module.loss.name}")
        else:
            folder = open_folder(self.path)
        replace_file(folder / CONFIG, config.encode())
        return folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._opened:
            return
        if self._goes_on and not self._restored:
            own = str(cast("Path", self.path) / CHECKPOINT)
            raise ValueError(f"resume=True needs the checkpoint of the run: trainer.fit(…, ckpt_path={own!r})")
        # So that a run which is stopped during its first epoch starts that epoch again when it is resumed.
        if not self._goes_on:
            self._checkpoint(trainer)
        self._saved = time.monotonic()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    def state_dict(self) -> dict[str, Any]:
        # The last validation, which a run that goes on does not repeat.
        return {"validated": self._validated, "val_metrics": self._val_metrics, "confusion": self._confusion}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated, self._val_metrics = state_dict["validated"], state_dict["val_metrics"]
        self._confusion = state_dict["confusion"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._opened or not self._due(trainer, batch_idx):
            return
        # Between two steps of the optimizer. At the end of an epoch, and where a validation follows, Lightning would
        # take up the run behind it: the results of the epoch, or of the validation, would be missing.
        between = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        counted = batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx
        validates = (counted + 1) % trainer.val_check_batch == 0 if trainer.val_check_batch else False
        if between and not trainer.is_last_batch and not validates:
            self._checkpoint(trainer)

    def _due(self, trainer: Trainer, batch_idx: int) -> bool:
        due = time.monotonic() - self._saved >= self.save_every
        if trainer.world_size == 1:
            return due
        # All processes or none; asked seldom, because they have to wait for one another to know.
        step = batch_idx // trainer.accumulate_grad_batches
        return step % _ASK_EVERY == 0 and bool(trainer.strategy.broadcast(due))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._confusion = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # LinearClassifier's validation step returns what it predicted; one that a user overrides may not.
        if not (self._opened and isinstance(outputs, Tensor) and isinstance(pl_module, Trained)):
            return
        k = int(pl_module.hparams["num_classes"])
        if k <= MOST_CLASSES and not trainer.sanity_checking:
            ignored = pl_module.loss.ignore_index
            matrix = multiclass_confusion_matrix(outputs, batch[1].long(), k, ignore_index=ignored, validate_args=False)
            self._confusion = matrix if self._confusion is None else self._confusion + matrix

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        logged = trainer.callback_metrics.items()
        self._val_metrics = {name: float(value) for name, value in logged if name.startswith("val_")}
        if self._confusion is not None:
            self._confusion = cast("Tensor", trainer.strategy.reduce(self._confusion, reduce_op="sum"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._opened:
            return
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        # Lightning keeps what an earlier epoch logged, and not what this one did before it was interrupted.
        stale = self._validated < trainer.current_epoch
        logged = trainer.callback_metrics.items()
        row |= {} if stale else self._val_metrics
        row |= {name: float(value) for name, value in logged if not (stale and name.startswith("val_"))}
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        folder = cast("Path", self.path)
        if trainer.is_global_zero:
            replace_file(folder / METRICS, rows_to_csv(self.rows).encode())
        self._checkpoint(trainer)

    def _checkpoint(self, trainer: Trainer) -> None:
        # Beside and then renamed: Lightning moves a file from /tmp, which is no single step if that is another disk.
        path = cast("Path", self.path) / CHECKPOINT
        part = path.with_name(f".{CHECKPOINT}.part")
        try:
            trainer.save_checkpoint(part, weights_only=False)
            if trainer.is_global_zero:
                part.replace(path)
        finally:
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._opened:
            return
        others = [c for c in trainer.checkpoint_callbacks if not isinstance(c, RunFolder)]
        best = next((getattr(c, "best_model_path", "") for c in others), "")
        self.best_model_path = best or str(cast("Path", self.path) / CHECKPOINT)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module, interrupted=False)
        trainer.strategy.barrier()  # no process goes on before the folder is whole

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._opened or trainer.state.fn != "fit":
            return
        started = (cast("Path", self.path) / CHECKPOINT).exists()
        if not trainer.is_global_zero:
            return
        if isinstance(exception, KeyboardInterrupt) and started:
            self._finish(trainer, pl_module, interrupted=True)
            checkpoint = str(cast("Path", self.path) / CHECKPOINT)
            script = f"RunFolder({str(self.path)!r}, resume=True) and trainer.fit(…, ckpt_path={checkpoint!r})"
            how = f"torchlin fit --resume {self.path}" if self.config else script
            rank_zero_info(f"torchlin: interrupted; {self.path} is complete up to here, to go on: {how}")
        elif not (self.rows or self.resume):
            self._discard()

    def _discard(self) -> None:
        folder = cast("Path", self.path)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not ours alone: something else lies in it
            folder.rmdir()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._opened and trainer.is_global_zero and isinstance(pl_module, Trained)):
            return
        if _data(trainer) is not self._fitted[1]:
            return  # other data than those of the run
        folder = cast("Path", self.path)
        kept, tested = load_head(folder), pl_module.to_head().cpu()
        if not (torch.equal(kept.weight, tested.weight) and torch.equal(kept.bias, tested.bias)):
            return  # another checkpoint was tested, and the head in the folder is not that one
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test_")}
        add_metrics(folder, metrics)

    def _finish(self, trainer: Trainer, module: LightningModule, *, interrupted: bool) -> None:
        data = _data(trainer)
        folder = cast("Path", self.path)
        # The last value of each: an epoch need not have had a validation, and an interrupted one has none at all.
        latest = {name: value for row in self.rows for name, value in row.items()}
        metrics = finite({name: value for name, value in latest.items() if name not in ("epoch", "step")})
        facts = {"epochs": len(self.rows), "steps": trainer.global_step, "interrupted": interrupted, "metrics": metrics}
        head = write_result(folder, cast("Trained", module), data, facts)
        std = cast("Trained", module).standardization.std
        draw(folder, head, std, self.rows, self._confusion)


def check_checkpoint(path: Path, module: LightningModule) -> None:
    """That a checkpoint can be read, and fits the module that is to go on from it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or from another number of features, classes or another loss.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: holds no {path.name}, so there is nothing to resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, no checkpoint can be read from it ({type(error).__name__})") from None
    for key in ("in_features", "num_classes", "loss"):
        if saved.get(key) != module.hparams[key]:
            raise ValueError(f"{path}: trained with {key}={saved.get(key)}, but now it is {module.hparams[key]}")


def _config(module: LightningModule) -> str:
    """config.yaml of a run that a script made: the classifier's options, for `torchlin fit --config`."""
    known = inspect.signature(LinearClassifier).parameters  # a subclass may have others, which YAML need not know
    options = {k: v for k, v in module.hparams.items() if k in known and k not in ("in_features", "num_classes")}
    trained = cast("Trained", module)
    penalty = None if trained.penalty is None else PENALTY_REGISTRY.spec(trained.penalty)
    plain = {"loss": LOSS_REGISTRY.spec(trained.loss), "penalty": penalty}
    text: str = yaml.safe_dump({"model": {**options, **plain}}, sort_keys=False)
    return text


def _check_names(trained: Trained, data: object) -> None:
    """That the data name as many classes as the head tells apart: better before training than after it."""
    names = getattr(data, "class_names", None)
    classes = trained.loss.classes(trained.to_head().out_features)
    if names and len(names) != classes:
        raise ValueError(f"the data have {len(names)} class_names, this classifier num_classes={classes}")


def _data(trainer: Trainer) -> object:
    return getattr(trainer, "datamodule", None)  # exists at run time only


def _dry(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # exists at run time only
