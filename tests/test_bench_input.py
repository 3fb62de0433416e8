"""scripts/bench_input.py on a handful of images: every part runs, and its tables are whole.

Starting Python takes most of the time of a run this small, so what the script would start in processes of its own is
called in this one; `memory` and the slow test start them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from training import write_photos

import torchlin
import torchlin.cli

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_input.py"
TINY = ["--rounds", "1", "--threads", "1"]
TINY_EPOCHS = [*TINY, "--epochs", "3", "--stock-epochs", "2", "--batch-size", "16"]

Run = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_input", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_input", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "keep_to_cores", lambda threads: threads)  # the tests go on after this one
    installed = str(Path(torchlin.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [installed, os.environ.get("PYTHONPATH")])))
    return module


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def in_this_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(child: Callable[..., Any], **arguments: Any) -> Any:
        return json.loads(json.dumps(child(**json.loads(json.dumps(arguments)))))

    def run_quietly(arguments: Sequence[str]) -> None:
        assert arguments[:2] == ["-m", "torchlin"]
        assert torchlin.cli.main(arguments[2:]) == 0

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "run_quietly", run_quietly)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    counts = {"train/cat": 30, "train/dog": 30, "test/cat": 6, "test/dog": 6}
    return write_photos(tmp_path / "images", counts, size=(8, 8))


def tables_of(output: str) -> list[dict[str, list[str]]]:
    """Each table of a page of Markdown: its rows by their first cell, the header under ""."""
    tables: list[dict[str, list[str]]] = [{}]
    for line in output.splitlines():
        if line.startswith("| ---"):
            continue
        if line.startswith("|"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            tables[-1][first] = cells
        elif tables[-1]:
            tables.append({})
    return [table for table in tables if table]


def number(cell: str) -> float:
    return math.nan if cell in ("n/a", "–") else float(cell.replace(",", ""))


def check_epochs(output: str) -> None:
    assert f"torch {torch.__version__.partition('+')[0]}" in output
    assert "### Epochs of 60 images, batches of 16" in output
    times, checks = tables_of(output)[:2]
    assert list(times) == ["", "stock", "bare", "torchlin", "torchlin, second run"]
    assert times[""][4] == "training accuracy, epoch 2"
    for way in list(times)[1:]:
        whole, first, warm, rate, accuracy, _ = map(number, times[way])
        assert whole >= first > 0, way
        assert rate == pytest.approx(60 / warm, rel=0.5)
        assert 0 <= accuracy <= 1
    assert checks[""] == ["measured", "promised", "kept"]
    assert len(checks) == 5


def check_predict(output: str) -> None:
    assert "### Labelling 12 images" in output
    times, checks = tables_of(output)[-2:]
    assert list(times) == ["", "stock, one at a time", "stock, batches of 128", "torchlin predict"]
    assert [times[way][-1] for way in list(times)[1:]] == ["100.0%"] * 3
    assert len(checks) == 5


@pytest.mark.usefixtures("in_this_process")
def test_every_way_to_train_is_timed(run: Run, root: Path) -> None:
    check_epochs(run("epochs", "--root", str(root), *TINY_EPOCHS))


@pytest.mark.usefixtures("in_this_process")
def test_predictions_are_those_of_a_stock_loop(run: Run, root: Path) -> None:
    check_predict(run("predict", "--root", str(root), *TINY))


def test_photographs(run: Run) -> None:
    output = run("photos", "--photos", "12", *TINY)
    rates, checks = tables_of(output)
    assert number(rates["torchlin"][0]) > 0
    assert number(rates["Pillow"][0]) > 0
    assert checks["torchlin / Pillow"][1] == "≥ 2"
    difference = output.partition("Mean absolute difference of the pixels: ")[2].split()[0]
    assert 0 <= float(difference) < 5


def test_memory_of_a_mapped_store(run: Run) -> None:
    output = run("memory", "--gigabytes", "0.06", *TINY)
    assert "a store of 0.06 GB, 305 images" in output
    phases, checks = tables_of(output)
    assert list(phases) == ["", "after the imports", "building", "training"]
    assert checks["peak RssAnon above the imports, MB"][1] == "≤ 600"


def test_without_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("gpu", *TINY).rstrip().endswith("no GPU here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("in_this_process")
def test_on_a_gpu(run: Run, root: Path) -> None:
    table = tables_of(run("gpu", "--root", str(root), *TINY_EPOCHS))[0]
    assert list(table) == ["", "bare", "torchlin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epoch"], "unknown part 'epoch'; known: epochs, photos"),
        (["predict"], "--root None: name a folder that holds train/ and test/"),
        (["epochs", "--stock-epochs", "9", "--epochs", "8"], "--stock-epochs is at least 2 and at most --epochs"),
    ],
)
def test_what_cannot_be_measured_is_said(
    run: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert message in f"{stopped.value}{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.usefixtures("script")
def test_as_a_command(root: Path) -> None:
    command = [sys.executable, str(SCRIPT), "epochs", "predict", "--root", str(root), *TINY_EPOCHS]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_epochs(done.stdout)
    check_predict(done.stdout)
