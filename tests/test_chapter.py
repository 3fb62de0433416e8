"""The chapter's worked numbers: the script runs from any folder, and every row agrees or is a known misprint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import torchlin

SCRIPT = Path(__file__).parents[1] / "scripts" / "chapter.py"
FIGURES = {"losses.png", "log_loss.png", "computation_graph.png", "descent.png", "l1_l2_digits.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("anywhere")
    installed = str(Path(torchlin.__file__).parents[1])
    paths = [installed, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", str(SCRIPT)],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    return done, folder


def rows_of(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.count(" | ") == 3]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def test_every_row_agrees_or_is_a_misprint(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = run
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = rows_of(done.stdout)
    assert header == ["what", "chapter", "computed", "agrees"]
    assert len(rows) > 50
    assert all(all(cells) for cells in rows)
    assert {cells[3] for cells in rows} == {"yes", "misprint"}
    misprints = {cells[1]: cells[2] for cells in rows if cells[3] == "misprint"}
    assert misprints.keys() == {"0.39", "3(w₂+3)"}
    assert "0.31 is right" in misprints["0.39"]
    assert "2(w₂+3) is right" in misprints["3(w₂+3)"]
    assert f"{len(rows)} rows: {len(rows) - 2} agree, 2 misprints of the chapter, 0 disagree." in done.stdout


@pytest.mark.parametrize(
    ("what", "chapter", "computed"),
    [
        ("largest raw score of x = (26, 100, 90, 80), b = 0", "287.8", "287.8"),
        ("its class", "2 (tiger)", "2 (tiger)"),
        ("perceptron losses", "0.8, 0, 24.6", "(0.8, 0, 24.6)"),
        ("hinge losses, margin 1", "1.8, 0, 26.6", "(1.8, 0, 26.6)"),
        ("sensitivity of w² + 3 at w = 2", "4", "4"),
        ("−log p at p = e^−10000 / (1 + e^−10000)", "finite; grows as p → 0", "10000 (p first, then its log: inf)"),
    ],
)
def test_the_worked_numbers_are_in_the_table(
    run: tuple[subprocess.CompletedProcess[str], Path], what: str, chapter: str, computed: str
) -> None:
    assert [what, chapter, computed, "yes"] in rows_of(run[0].stdout)


def test_the_columns_are_aligned(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    lines = [line for line in run[0].stdout.splitlines() if line.count(" | ") == 3]
    bars = {tuple(i for i, character in enumerate(line) if character == "|") for line in lines}
    assert len(bars) == 1


def test_the_figures_show_something(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    folder = run[1] / "chapter"
    assert {path.name for path in folder.iterdir()} == FIGURES
    for path in folder.iterdir():
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300, path.name
        assert len(np.unique(pixels[..., :3].mean(2))) > 50, path.name


def test_it_opens_as_a_notebook() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.startswith("# %%")
    assert text.count("# %%\n") >= 10
