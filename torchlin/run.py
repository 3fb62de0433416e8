"""Run folders: what a trained model is on disk, and the callback that writes one."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

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

_OURS = {CHECKPOINT, CONFIG, METRICS, "head.safetensors", "head.json", "templates.png", "curves.png", "confusion.png"}


@runtime_checkable
class Trained(Protocol):
    """What a run folder can be written from: `LinearClassifier` is one."""

    loss: Loss
    penalty: Penalty | None

    @property
    def standardization(self) -> Standardization: ...

    def to_head(self) -> LinearHead: ...


def open_folder(path: str | os.PathLike[str]) -> Path:
    """A new, empty folder for a run.

    Raises:
        ValueError: the folder is not empty, is a file, or cannot be written to.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: not empty; choose another folder with --run, or continue an interrupted run with "
            f"--resume {folder}"
        )
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
    """The folder under `root` whose head was written last.

    Raises:
        FileNotFoundError: there is none.
    """
    heads = sorted(root.glob("*/head.json"), key=lambda p: p.stat().st_mtime_ns)
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

    After each epoch it writes `metrics.csv` and `checkpoint.ckpt`; when fitting ends, also by Ctrl-C,
    `head.safetensors`, `head.json`, and the pictures `templates.png`, `curves.png` and `confusion.png`. `trainer.test`
    with the same callback adds the test metrics. The head is that of the last step. A run that fails before
    its first epoch is complete leaves nothing behind.

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
        self._opened = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._opened:
            return
        if not isinstance(pl_module, Trained):
            raise TypeError(f"RunFolder writes the head of a LinearClassifier, got {type(pl_module).__name__}")
        if trainer.is_global_zero:
            self.path = self._open(trainer, pl_module)
        self.path = trainer.strategy.broadcast(self.path)
        self._opened = True

    def _open(self, trainer: Trainer, module: Trained) -> Path:
        if self.resume:
            folder = find_run(cast("Path", self.path))
            self.rows = _read_rows(folder / METRICS)
            return folder
        if self.path is None:
            data = getattr(_data(trainer), "name", "data")
            folder = number_folder(f"{data}-{module.loss.name}")
        else:
            folder = open_folder(self.path)
        config = self.config
        if config is None:
            config = yaml.safe_dump({"model": dict(cast("LightningModule", module).hparams)}, sort_keys=False)
        replace_file(folder / CONFIG, config.encode())
        return folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        row |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        folder = cast("Path", self.path)
        if trainer.is_global_zero:
            replace_file(folder / METRICS, _csv(self.rows).encode())
        trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._finish(trainer, pl_module, interrupted=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._opened or trainer.state.fn != "fit":
            return
        if isinstance(exception, KeyboardInterrupt):
            folder = cast("Path", self.path)
            if not (folder / CHECKPOINT).exists():
                trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)
            if trainer.is_global_zero:
                self._finish(trainer, pl_module, interrupted=True)
        elif trainer.is_global_zero and not self.rows:
            self._discard()

    def _discard(self) -> None:
        folder = cast("Path", self.path)
        for name in _OURS:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not ours alone: something else lies in it
            folder.rmdir()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._opened and trainer.is_global_zero):
            return
        folder = cast("Path", self.path)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test_")}
        add_metrics(folder, metrics)

    def _finish(self, trainer: Trainer, module: LightningModule, *, interrupted: bool) -> None:
        data = _data(trainer)
        folder = cast("Path", self.path)
        # The rows hold what was last logged in each epoch; the last is what the head was at its end.
        metrics = {k: v for k, v in (self.rows[-1] if self.rows else {}).items() if k not in ("epoch", "step")}
        facts = {"epochs": len(self.rows), "steps": trainer.global_step, "interrupted": interrupted, "metrics": metrics}
        head = write_result(folder, cast("Trained", module), data, facts)
        loader = trainer.val_dataloaders
        std = cast("Trained", module).standardization.std
        draw(folder, head, std, self.rows, loader if isinstance(loader, Iterable) else ())


def write_result(folder: Path, trained: Trained, data: object, facts: Mapping[str, Any]) -> LinearHead:
    """Write head.safetensors and head.json; `data` may be any data module, or None. Returns the head as written."""
    head = trained.to_head().cpu()
    loss = LOSS_REGISTRY.make(head.info["loss"])
    classes = loss.classes(head.out_features)
    names = getattr(data, "class_names", None) or [str(c) for c in range(classes)]
    known = {
        "input": getattr(data, "input_info", None) or {"kind": "features", "shape": [head.in_features]},
        "penalty": None if trained.penalty is None else PENALTY_REGISTRY.spec(trained.penalty),
        "data": {key: getattr(data, key, None) for key in ("name", "fingerprint", "sizes")},
        "torchlin": __version__,
    }
    save_head(
        head,
        folder,
        class_names=names,
        loss=loss,
        standardization=trained.standardization,
        info={**known, **facts},
    )
    return load_head(folder)


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Add metrics to the head.json of a run."""
    import json

    path = folder / "head.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["metrics"] = {**info.get("metrics", {}), **metrics}
    replace_file(path, (json.dumps(info, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def draw(
    folder: Path, head: LinearHead, std: Tensor, rows: Sequence[Mapping[str, float]], loader: Iterable[Any]
) -> None:
    """Draw the pictures of a run: class templates (W·σ), learning curves, and the confusion matrix of `loader`."""
    from torchlin import report

    drawn = {"templates.png": report.plot_templates(head, std=std)}
    if rows:
        drawn["curves.png"] = report.plot_curves(list(rows))
    matrix = confusion_matrix(head, loader)
    if int(matrix.sum()):
        drawn["confusion.png"] = report.plot_confusion(matrix, head.info["class_names"])
    for name, axes in drawn.items():
        report.save(axes, folder / name)
        report.close(axes)


def confusion_matrix(head: LinearHead, loader: Iterable[Any]) -> Tensor:
    """Counts (k, k) of the batches (x, y) of `loader`: rows are true classes, columns predicted ones."""
    k = len(head.info["class_names"])
    matrix = torch.zeros(k, k, dtype=torch.long)
    for x, y in loader:
        matrix += multiclass_confusion_matrix(head.predict(x.cpu()), y.cpu(), k)
    return matrix


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


def _data(trainer: Trainer) -> object:
    return getattr(trainer, "datamodule", None)  # exists at run time only
