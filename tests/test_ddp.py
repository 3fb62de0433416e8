"""Two processes that train together, by gloo on the CPU: the run on two is the run on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Kill
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from processes import SECONDS, exit_codes, in_process
from training import RUN_FILES, blobs, write_photos

from torchlin import DivergenceError, LinearClassifier, RunFolder
from torchlin.data import ArrayDataModule, ImageFolderDataModule, decoding
from torchlin.data.base import Arrays, SplitName

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CLASSES = 3
EPOCHS = 3
DIVERGED = 7


class Some(ArrayDataModule):
    """Features or small images in three classes of unequal size."""

    def __init__(self, n: int, images: bool = False, spoiled: bool = False, **options: Any) -> None:
        self.n, self.images, self.spoiled = n, images, spoiled
        shape = [2, 3, 4] if images else [5]
        info = {"kind": "pixels" if images else "features", "shape": shape, "color": None, "image_size": None}
        super().__init__("some", ["a", "b", "c"], info, ("train", "val", "test"), **options)

    def read_splits(self, splits: Sequence[SplitName]) -> Mapping[SplitName, Arrays]:
        arrays = {}
        for seed, split in enumerate(("train", "val", "test")):
            n = self.n + 4 * seed
            x, _ = blobs(n, CLASSES, 24 if self.images else 5, seed)
            y = torch.arange(n).remainder(7).clamp(max=2)  # 1, 1 and 5 of each 7
            x = x + y[:, None]
            if self.images:
                x = (x * 20 + 100).clamp(0, 255).to(torch.uint8).view(n, 2, 3, 4)
            if self.spoiled and split == "train":
                x[n // 2, 0] = float("nan")
            arrays[split] = Arrays(x, y)
        return arrays


class Logged(Checkpoint):
    """What was logged in each epoch; such callbacks come after the module."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer_of(processes: int, callbacks: Sequence[Any], **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = "ddp" if processes > 1 else "auto"
    return Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        callbacks=list(callbacks),
        **quiet,
        **options,
    )


def fit(
    folder: str, processes: int, data: dict[str, Any], model: dict[str, Any], options: dict[str, Any], run: str = ""
) -> None:
    """Train and test; every process writes what it ended with. `run`: "new" or "resume" for a run folder."""
    module = Some(**data)
    classifier = LinearClassifier(module.in_features, CLASSES, **model)
    logged = Logged()
    callbacks: list[Any] = [logged, Kill()]
    if run:
        callbacks.append(RunFolder(f"{folder}/run", resume=run == "resume", save_every=0))
    trainer = trainer_of(processes, callbacks, **options)
    checkpoint = f"{folder}/run/checkpoint.ckpt" if run == "resume" else None
    trainer.fit(classifier, module, ckpt_path=checkpoint, weights_only=True)
    (tested,) = trainer.test(classifier, module, verbose=False)
    head = classifier.to_head()
    result = {"weight": head.weight.detach(), "bias": head.bias.detach(), "rows": logged.rows, "test": dict(tested)}
    torch.save(result, f"{folder}/result-{trainer.global_rank}.pt")


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(path) for path in sorted(folder.glob("result-*.pt"))]


def assert_alike(one: dict[str, Any], other: dict[str, Any], within: float) -> None:
    for name in ("weight", "bias"):
        torch.testing.assert_close(one[name], other[name], rtol=within, atol=within)
    assert len(one["rows"]) == len(other["rows"])
    for row, same in zip([*one["rows"], one["test"]], [*other["rows"], other["test"]], strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            # Metrics are float32 in any run.
            assert value == pytest.approx(same[name], rel=max(within, 1e-6), abs=1e-7), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "uneven last batch": ({"n": 45, "batch_size": 8}, {}, {}),
    "nothing for one process": ({"n": 9, "batch_size": 4}, {}, {}),
    "one sample at a time": ({"n": 5, "batch_size": 1}, {}, {}),
    "balanced": ({"n": 33, "batch_size": 7}, {"class_weight": "balanced"}, {}),
    "class weights": ({"n": 33, "batch_size": 7}, {"class_weight": [1.0, 0.0, 3.0]}, {}),
    "ignored labels": ({"n": 33, "batch_size": 4}, {"loss": {"name": "softmax", "ignore_index": 2}}, {}),
    "ignored and weighted": (
        {"n": 33, "batch_size": 4},
        {"loss": {"name": "softmax", "ignore_index": 2, "weight": [1.0, 2.0, 5.0]}},
        {},
    ),
    "l1": ({"n": 45, "batch_size": 8}, {"penalty": {"name": "l1", "strength": 0.02}}, {}),
    "adam": ({"n": 45, "batch_size": 8}, {"optimizer": "adam"}, {}),
    "hinge": ({"n": 45, "batch_size": 8}, {"loss": "hinge"}, {}),
    "flips and crops": ({"n": 45, "batch_size": 8, "images": True, "flip": True, "crop_padding": 1}, {}, {}),
    "accumulated": ({"n": 45, "batch_size": 8}, {}, {"accumulate_grad_batches": 2}),
    "workers": ({"n": 20, "batch_size": 8, "num_workers": 1}, {}, {}),
}


@pytest.mark.parametrize(("precision", "within"), [("64-true", 1e-6), ("32-true", 1e-4)])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(tmp_path: Path, name: str, precision: str, within: float) -> None:
    data, model, options = CASES[name]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        folder = tmp_path / str(processes)
        in_process(
            folder, fit, str(folder), processes, data, model, {**options, "precision": precision}, processes=processes
        )
    (alone,), (first, second) = results(tmp_path / "1"), results(tmp_path / "2")
    assert_alike(first, alone, within)
    assert_alike(second, first, 1e-12)
    assert len(alone["rows"]) == EPOCHS
    assert alone["weight"].abs().max() > 0.01
    if name == "l1":
        assert (alone["weight"] == 0).any()


# Runs that are interrupted.

LONG = {"n": 60, "batch_size": 7, "images": True, "flip": True, "crop_padding": 1}
L1 = {"penalty": {"name": "l1", "strength": 0.01}, "class_weight": "balanced"}
DOUBLE = {"precision": "64-true"}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("point", ["batch_end:0:5", "batch_start:1:5", "validation:1"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_and_resumed(tmp_path: Path, before: int, after: int, point: str, accumulate: int) -> None:
    """A run of so many processes goes on as one of so many."""
    whole, run = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, run):
        folder.mkdir()
    options = {**DOUBLE, "accumulate_grad_batches": accumulate}
    in_process(whole, fit, str(whole), 2, LONG, L1, options, "new", processes=2)
    in_process(run, fit, str(run), before, LONG, L1, options, "new", kill=point, processes=before)
    saved = torch.load(run / "run" / "checkpoint.ckpt", weights_only=True)
    # Several processes ask one another seldom whether a checkpoint is due.
    assert saved["train_loader"]["batches"] == accumulate if before == 2 else saved["train_loader"]["batches"] > 3
    in_process(run, fit, str(run), after, LONG, L1, options, "resume", processes=after)
    expected, resumed = results(whole)[0], results(run)[0]
    expected["rows"] = expected["rows"][-len(resumed["rows"]) :]
    assert_alike(resumed, expected, 1e-12 if before == after == 2 else 1e-6)
    for folder in (whole, run):
        assert {path.name for path in (folder / "run").iterdir()} == RUN_FILES
    lines = [(folder / "run" / "metrics.csv").read_text().splitlines() for folder in (whole, run)]
    assert [len(rows) for rows in lines] == [EPOCHS + 1] * 2


# What both processes touch.


def fit_folder(root: str, folder: str) -> None:
    rank = os.environ["LOCAL_RANK"]
    seen: list[str] = []
    decode = decoding.decode_image

    def spy(path: Any, *rest: Any) -> Any:
        seen.append(str(path))
        time.sleep(0.02)
        return decode(path, *rest)

    decoding.decode_image = spy  # type: ignore[assignment]
    data = ImageFolderDataModule(root, batch_size=8)
    model = LinearClassifier(data.in_features, data.num_classes)
    trainer_of(2, [RunFolder(f"{folder}/run")]).fit(model, data)
    Path(folder, f"decoded-{rank}").write_text(str(len(seen)))


def test_the_store_is_built_once_and_the_folder_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLIN_CACHE", str(tmp_path / "cache"))
    root = write_photos(tmp_path / "photos", {"cat": 40, "dog": 40})
    in_process(tmp_path, fit_folder, str(root), str(tmp_path), processes=2)
    assert sorted(int((tmp_path / f"decoded-{rank}").read_text()) for rank in (0, 1)) == [0, 80]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != ".locks"]) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == EPOCHS + 1


class Poison(Callback):
    """A loss that is not finite in one process, while the weights of both still are."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == 1:
            pl_module._recent[pl_module._unseen - 1] = float("inf")


def diverge(folder: str, spoiled: bool, options: dict[str, Any]) -> int:
    data = Some(45, spoiled=spoiled, batch_size=8)
    data._standardization = Some(45).standardization  # that of the data as they should be
    model = LinearClassifier(data.in_features, CLASSES, lr=0.1)
    callbacks = [RunFolder(f"{folder}/run"), *([] if spoiled else [Poison()])]
    try:
        trainer_of(2, callbacks, **options).fit(model, data)
    except DivergenceError:
        return DIVERGED
    return 0


@pytest.mark.parametrize("spoiled", [True, False])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_divergence_stops_both(tmp_path: Path, spoiled: bool, options: dict[str, Any]) -> None:
    """One process alone has the sample that is NaN, or the loss that is infinite."""
    codes, output = exit_codes(tmp_path, diverge, str(tmp_path), spoiled, options, processes=2)
    assert codes == [DIVERGED] * 2, output
    assert not (tmp_path / "run").exists()


def test_one_process_that_is_killed_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    in_process(tmp_path, fit, str(tmp_path), 2, LONG, {}, {}, "new", kill="batch_end:1:2", processes=2)


@pytest.fixture
def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def test_the_command_line_on_two_processes(tmp_path: Path, environment: dict[str, str]) -> None:
    """Lightning starts the second process itself. A run on two is that on one, and says what it has to say once."""
    root = write_photos(tmp_path / "photos", {"train/cat": 20, "train/dog": 25, "test/cat": 5, "test/dog": 6}, (6, 6))
    infos = []
    for processes in (1, 2):
        several = [f"--trainer.devices={processes}", *(["--trainer.strategy=ddp"] if processes > 1 else [])]
        run = tmp_path / str(processes)
        command = ["fit", f"--data.root={root}", "--data.batch_size=8", "--trainer.max_epochs=2", f"--run={run}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "torchlin", *command, "--trainer.accelerator=cpu", *several],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, err
        assert out.count("written to") == 1
        assert {path.name for path in run.iterdir()} == RUN_FILES
        infos.append(json.loads((run / "head.json").read_text()))
    one, two = infos
    assert {"test_accuracy", "val_accuracy", "train_accuracy"} <= one["metrics"].keys()
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
