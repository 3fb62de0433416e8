"""Run folders: what a trained model is on disk, and the callback that writes one."""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from torchlin.classifier import LinearClassifier
from torchlin.heads import LinearHead, Standardization
from torchlin.losses import LOSS_REGISTRY, Loss
from torchlin.penalties import PENALTY_REGISTRY, Penalty
from torchlin.registry import nearest
from torchlin.storage import load_head, replace_file, save_head
from torchlin.version import __version__

RUNS = Path("runs")
CHECKPOINT = "checkpoint.ckpt"
CONFIG = "config.yaml"
METRICS = "metrics.csv"

# Beyond this many classes a confusion matrix is no picture.
_MOST_CLASSES = 1000
_OURS = {CHECKPOINT, CONFIG, METRICS, "head.safetensors", "head.json", "templates.png", "curves.png", "confusion.png"}


@runtime_checkable
class Trained(Protocol):
    """What a run folder can be written from: `LinearClassifier` is one."""

    loss: Loss
    penalty: Penalty | None

    @property
    def standardization(self) -> Standardization: ...

    def to_head(self) -> LinearHead: ...


def check_free(path: str | os.PathLike[str]) -> None:
    """That a new run may be written to `path`.

    Raises:
        ValueError: a file, or a folder that is not empty.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: not empty; choose another folder with --run, or continue an interrupted run with "
            f"--resume {folder}"
        )


def open_folder(path: str | os.PathLike[str]) -> Path:
    """A new, empty folder for a run.

    Raises:
        ValueError: the folder is not empty, is a file, or cannot be written to.
    """
    check_free(path)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written to ({error.strerror}); choose another folder with --run"
        ) from None
    return folder


def number_folder(name: str, root: Path = RUNS) -> Path:
    """A new folder root/<name>-<number>, the number counting up; two processes never get the same one."""
    taken = [int(p.name.removeprefix(f"{name}-")) for p in _runs(root, name) if p.name.rpartition("-")[2].isdigit()]
    number = max(taken, default=0) + 1
    while True:
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ValueError(f"{folder}: cannot be made ({error.strerror}); choose another folder with --run") from None
        else:
            return folder


def _runs(root: Path, name: str) -> list[Path]:
    return [p for p in root.iterdir() if p.name.rpartition("-")[0] == name] if root.is_dir() else []


def newest_run(root: Path = RUNS) -> Path:
    """The folder under `root` that was trained last (measuring an old run does not make it the newest).

    Raises:
        FileNotFoundError: there is none.
    """
    heads = sorted(root.glob("*/head.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    if not heads:
        raise FileNotFoundError(f"{root}: holds no finished run; train one with `torchlin fit`, or name one with --run")
    return heads[-1].parent


def find_run(path: str | os.PathLike[str]) -> Path:
    """The run folder `path`, which must exist; a name alone is also looked for under runs/."""
    for folder in (Path(path), RUNS / path):
        if folder.is_dir():
            return folder
    known = [p.name for p in RUNS.iterdir()] if RUNS.is_dir() else []
    raise FileNotFoundError(f"{path}: no such run folder{nearest(Path(path).name, known)}")


class RunFolder(Checkpoint):
    """Callback that keeps a run folder: `Trainer(callbacks=[torchlin.RunFolder("runs/mine")])`.

    When training starts and after each epoch it writes `checkpoint.ckpt`, after each epoch `metrics.csv`; when fitting
    ends, also by Ctrl-C, `head.safetensors`, `head.json`, and the pictures `templates.png`, `curves.png` and
    `confusion.png`. `trainer.test` with the same callback adds the test metrics. The head is that of the last step. A
    run that fails before its first epoch is complete leaves nothing behind, and neither does `fast_dev_run`.

    Args:
        path: the folder; None for runs/<data>-<loss>-<number>.
        resume: continue in a folder that a run was interrupted in (give its checkpoint.ckpt to `trainer.fit` too).
        config: text of config.yaml; the classifier's arguments if not given.

    Raises:
        ValueError: the folder is not empty, or cannot be written to.
        TypeError: the module has no head to write.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, resume: bool = False, config: str | None = None
    ) -> None:
        if resume and path is None:
            raise ValueError("resume=True needs the path of the run to resume")
        self.path = None if path is None else Path(path)
        self.resume = resume
        self.config = config
        self.rows: list[dict[str, float]] = []
        # Lightning asks the first checkpointing callback for this when it is told to test without a model.
        self.best_model_path = ""
        self._opened = False
        self._fitted: tuple[object, object] = (None, None)
        self._restored = False
        self._validated = -1  # the last epoch with a validation
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

    def _open(self, trainer: Trainer, module: Trained) -> Path:
        if self.resume:
            folder = find_run(cast("Path", self.path))
            self.rows = _read_rows(folder / METRICS)
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
        if self.resume and not self._restored:
            own = str(cast("Path", self.path) / CHECKPOINT)
            raise ValueError(f"resume=True needs the checkpoint of the run: trainer.fit(…, ckpt_path={own!r})")
        # So that a run which is stopped during its first epoch starts that epoch again when it is resumed.
        if not self.resume:
            self._checkpoint(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        if k <= _MOST_CLASSES and not trainer.sanity_checking:
            ignored = pl_module.loss.ignore_index
            matrix = multiclass_confusion_matrix(outputs, batch[1].long(), k, ignore_index=ignored, validate_args=False)
            self._confusion = matrix if self._confusion is None else self._confusion + matrix

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        if self._confusion is not None:
            self._confusion = cast("Tensor", trainer.strategy.reduce(self._confusion, reduce_op="sum"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._opened:
            return
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        # Lightning keeps what an earlier epoch logged.
        stale = self._validated < trainer.current_epoch
        logged = trainer.callback_metrics.items()
        row |= {name: float(value) for name, value in logged if not (stale and name.startswith("val_"))}
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        folder = cast("Path", self.path)
        if trainer.is_global_zero:
            replace_file(folder / METRICS, _csv(self.rows).encode())
        self._checkpoint(trainer)

    def _checkpoint(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(cast("Path", self.path) / CHECKPOINT, weights_only=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._opened:
            return
        others = [c for c in trainer.checkpoint_callbacks if not isinstance(c, RunFolder)]
        best = next((getattr(c, "best_model_path", "") for c in others), "")
        self.best_model_path = best or str(cast("Path", self.path) / CHECKPOINT)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module, interrupted=False)

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
        for name in _OURS:
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
        metrics = _finite({name: value for name, value in latest.items() if name not in ("epoch", "step")})
        facts = {"epochs": len(self.rows), "steps": trainer.global_step, "interrupted": interrupted, "metrics": metrics}
        head = write_result(folder, cast("Trained", module), data, facts)
        std = cast("Trained", module).standardization.std
        draw(folder, head, std, self.rows, self._confusion)


def write_result(folder: Path, trained: Trained, data: object, facts: Mapping[str, Any]) -> LinearHead:
    """Write head.safetensors and head.json; `data` may be any data module, or None. Returns the head as written."""
    head = trained.to_head().cpu()
    classes = trained.loss.classes(head.out_features)
    names = getattr(data, "class_names", None) or [str(c) for c in range(classes)]
    known = {
        "input": getattr(data, "input_info", None) or {"kind": "features", "shape": [head.in_features]},
        "penalty": None if trained.penalty is None else PENALTY_REGISTRY.spec(trained.penalty),
        "data": {key: getattr(data, key, None) for key in ("name", "fingerprint", "sizes")},
        "torchlin": __version__,
        **({"skipped_files": skipped} if (skipped := getattr(data, "skipped_files", None)) else {}),
    }
    save_head(
        head,
        folder,
        class_names=names,
        loss=head.info["loss"],
        standardization=trained.standardization,
        info={**known, **facts},
    )
    return load_head(folder)


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Add metrics to the head.json of a run."""
    import json

    path = folder / "head.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["metrics"] = {**info.get("metrics", {}), **_finite(metrics)}
    replace_file(path, (json.dumps(info, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


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


def draw(
    folder: Path, head: LinearHead, std: Tensor, rows: Sequence[Mapping[str, float]], confusion: Tensor | None
) -> None:
    """Draw the pictures of a run: class templates (W·σ), learning curves, and the confusion matrix (k, k) if any."""
    from torchlin import report

    drawn = {"templates.png": report.plot_templates(head, std=std)}
    if rows:
        drawn["curves.png"] = report.plot_curves(list(rows))
    if confusion is not None and int(confusion.sum()):
        drawn["confusion.png"] = report.plot_confusion(confusion.cpu(), head.info["class_names"])
    for name, axes in drawn.items():
        report.save(axes, folder / name)
        report.close(axes)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which JSON cannot say and a user's own metric may be."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _csv(rows: Sequence[Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: int(v) if k in ("epoch", "step") else v for k, v in row.items()})
    return text.getvalue()


def _read_rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(stream)]


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
