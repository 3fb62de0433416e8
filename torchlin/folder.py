"""Run folders on disk: their names, what they hold, and how a result is written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from torchlin.heads import LinearHead, Standardization
from torchlin.losses import Loss
from torchlin.penalties import PENALTY_REGISTRY, Penalty
from torchlin.registry import nearest
from torchlin.storage import load_head, replace_file, save_head
from torchlin.version import __version__

RUNS = Path("runs")
CHECKPOINT = "checkpoint.ckpt"
CONFIG = "config.yaml"
METRICS = "metrics.csv"
# Beyond this many classes a confusion matrix is no picture.
MOST_CLASSES = 1000
FILES = (CHECKPOINT, CONFIG, METRICS, "head.safetensors", "head.json", "templates.png", "curves.png", "confusion.png")


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


def begun(folder: Path) -> bool:
    """Whether a run got as far as its first checkpoint; one that was killed before holds no more than config.yaml."""
    return any((folder / name).exists() for name in FILES if name != CONFIG)


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
    path = folder / "head.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["metrics"] = {**info.get("metrics", {}), **finite(metrics)}
    replace_file(path, (json.dumps(info, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def draw(
    folder: Path, head: LinearHead, std: Tensor, rows: Sequence[Mapping[str, float]], confusion: Tensor | None
) -> None:
    """Draw the pictures of a run: class templates (W·σ), learning curves, and the confusion matrix (k, k) if any."""
    from torchlin import report  # here, because matplotlib takes a while to load and predict draws nothing

    drawn = {"templates.png": report.plot_templates(head, std=std)}
    if rows:
        drawn["curves.png"] = report.plot_curves(list(rows))
    if confusion is not None and int(confusion.sum()):
        drawn["confusion.png"] = report.plot_confusion(confusion.cpu(), head.info["class_names"])
    save_pictures(folder, drawn)


def save_pictures(folder: Path, drawn: Mapping[str, Any]) -> None:
    """Write pictures, file name → axes, into a run folder."""
    from torchlin import report

    for name, axes in drawn.items():
        report.save(axes, folder / name)
        report.close(axes)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which JSON cannot say and a user's own metric may be."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def rows_to_csv(rows: Sequence[Mapping[str, float]]) -> str:
    """metrics.csv: one row per epoch, an empty cell where an epoch has no such value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: int(v) if k in ("epoch", "step") else v for k, v in row.items()})
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(stream)]
