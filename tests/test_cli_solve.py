"""`torchlin solve`: fit's options in, a run folder out, and one line for everything a user can get wrong."""

from __future__ import annotations

import csv
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from commands import Run, refused
from PIL import Image
from training import RUN_FILES, write_photos, write_table

from torchlin import L1, L2, LinearClassifier, load_head, solve, solve_path
from torchlin.cli.configs import config_names
from torchlin.data import DigitsDataModule
from torchlin.report import plot_gap, plot_path

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")


FILES = RUN_FILES - {"checkpoint.ckpt"}
L2_OPTION = "--model.penalty={name: l2, strength: 0.01}"


def train_split() -> tuple[torch.Tensor, torch.Tensor]:
    data = DigitsDataModule()
    batches = list(data.train_dataloader())
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_solve_writes_a_run_that_everything_else_reads(run: Run) -> None:
    result = run("solve", L2_OPTION, "--tol=1e-6")
    assert result.code == 0
    folder = Path("runs/digits-softmax-1")
    assert {path.name for path in folder.iterdir()} == FILES
    head = load_head(folder)
    expected = solve(*train_split(), "softmax", L2(0.01), tol=1e-6)
    certificate = head.info["certificate"]
    assert certificate["objective"] == pytest.approx(expected.objective, rel=1e-6)
    assert certificate["gap"] <= 1e-6
    assert certificate["dual"] <= expected.objective
    assert head.info["trained_on"] == ["train"]
    metrics = head.info["metrics"]
    assert metrics["train_objective"] == certificate["objective"]
    out = " ".join(result.out.split())
    for label, split, size in (("train", "train", 1293), ("validation", "val", 144), ("test", "test", 360)):
        assert f"│ {label} │ {size} │ {metrics[split + '_loss']:.4f} │ {metrics[split + '_accuracy']:.4f} │" in out
    assert "certified to be at most" in out
    assert "next: torchlin predict --run" in out
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[-1]["gap"]) <= 1e-6
    assert len(rows) > 2

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tested = run("test")
    assert tested.code == 0
    words = " ".join(tested.out.split())
    assert f"test_accuracy │ {metrics['test_accuracy']:.4f}" in words
    assert re.search(r"objective 0\.\d+, certified to be at most \S+ above its optimum", words)
    after = json.loads((folder / "head.json").read_text())
    for name in ("test_loss", "test_accuracy", "test_balanced_accuracy"):
        assert after["metrics"][name] == pytest.approx(metrics[name], rel=1e-5)
    assert (folder / "head.safetensors").read_bytes() == before["head.safetensors"]
    assert run("validate").code == 0
    refused_resume = run("fit", "--resume", folder)
    assert refused_resume.code == 2
    assert "holds no checkpoint.ckpt" in refused_resume.err
    model = LinearClassifier(64, 10)
    model.set_head(head)
    # The configuration is fit's.
    assert run("fit", "--config", folder / "config.yaml", "--trainer.max_epochs=1", "--run=again").code == 0


def test_path_chooses_on_validation_data_and_refits(run: Run) -> None:
    result = run("solve", "--path", "--num=5", "--ratio=1e-4", "--run=best", "--model.penalty={name: l1, strength: 9}")
    assert result.code == 0, result.err
    folder = Path("best")
    assert {path.name for path in folder.iterdir()} == FILES | {"path.png"}
    info = load_head(folder).info
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    accuracies = [float(row["val_accuracy"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert info["penalty"]["name"] == "l1"
    assert info["penalty"]["strength"] == pytest.approx(float(rows[best]["strength"]))
    assert info["metrics"]["val_accuracy"] == pytest.approx(accuracies[best])
    assert info["trained_on"] == ["train", "val"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["penalty"] == info["penalty"]
    assert "chosen: strength" in result.out
    assert "on train and val" in result.out
    assert float(rows[0]["nonzero"]) == 0
    tested = run("test", "--run=best")
    assert re.search(r"objective \S+, certified to be at most", tested.out)


def test_path_by_folds(run: Run) -> None:
    result = run("solve", "--path", "--folds=3", "--num=3", "--criterion=loss", "--run=folds")
    assert result.code == 0, result.err
    info = load_head("folds").info
    assert info["trained_on"] == ["train", "val"]
    assert "val_balanced_accuracy" not in info["metrics"]
    assert info["metrics"]["val_loss"] < 0.5
    table = write_table(Path("a.csv"), (20, 20))
    assert run("solve", "--data.path", table, "--data.val_fraction=0", "--path", "--folds=2", "--num=2").code == 0


def test_every_loss(run: Run) -> None:
    table = write_table(Path("a.csv"), (20, 20))
    for loss in ("hinge", "crammer_singer", "squared_hinge", "logistic"):
        result = run("solve", "--data.path", table, "--model.loss", loss, "--tol=1e-3", "--run", loss, L2_OPTION)
        assert result.code == 0, result.err
        assert load_head(loss).info["certificate"]["gap"] <= 1e-3


def test_class_weights_come_to_numbers(run: Run) -> None:
    table = write_table(Path("a.csv"), (40, 10))
    options = ["--data.path", table, "--data.test_path", table, "--model.class_weight=balanced", L2_OPTION, "--run=w"]
    assert run("solve", *options).code == 0
    weight = load_head("w").info["loss"]["weight"]
    assert weight[1] == pytest.approx(4 * weight[0])
    tested = run("test", "--run=w")
    assert re.search(r"certified to be at most \S+ above", tested.out)


def test_a_run_of_fit_is_certified_by_test(run: Run) -> None:
    assert run("fit", L2_OPTION, "--trainer.max_epochs=2", "--run=sgd").code == 0
    found = re.search(r"objective (\S+), certified to be at most (\S+) above", run("test", "--run=sgd").out)
    assert found is not None
    best = solve(*train_split(), "softmax", L2(0.01), tol=1e-6).objective
    assert float(found[1]) - float(found[2]) == pytest.approx(best, rel=2e-3)
    assert run("fit", "--trainer.max_epochs=1", "--run=free").code == 0
    assert "no bound on its distance from the optimum: λ = 0" in run("test", "--run=free").out
    assert run("fit", "--model.loss=perceptron", "--trainer.max_epochs=1", "--run=p").code == 0
    assert "W = 0 is a global minimiser of the perceptron loss" in run("test", "--run=p").out
    # Other data than it was trained on say nothing about its objective.
    assert "objective" not in run("test", "--run=sgd", "--data.val_fraction=0.3").out


def test_keys_without_effect_are_listed(run: Run) -> None:
    config = {
        "trainer": {"max_epochs": 3},
        "model": {"loss": "softmax", "lr": 0.1, "optimizer": "adam", "penalty": {"name": "l2", "strength": 0.1}},
        "data": {"class_path": "torchlin.data.DigitsDataModule", "init_args": {"batch_size": 16}},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    result = run("solve", "--config=mine.yaml")
    assert result.code == 0, result.err
    assert "no effect on solve: model.optimizer, model.lr, trainer.max_epochs, data.batch_size\n" in result.out
    assert load_head("runs/digits-softmax-1").info["penalty"] == {"name": "l2", "strength": 0.1}


@pytest.mark.parametrize("name", [name for name in config_names() if not name.startswith("probe")])
def test_every_configuration_is_taken(run: Run, tmp_path: Path, name: str) -> None:
    options: list[Any] = []
    if "digits" not in name:
        counts = {"train/cat": 12, "train/dog": 12, "test/cat": 2, "test/dog": 2}
        options = ["--data.root", write_photos(tmp_path / "photos", counts)]
    if name == "binary-logistic":
        content = Path(__file__).parents[1].joinpath("configs", f"{name}.yaml").read_text()
        if "FeaturesDataModule" in content:
            options = ["--data.path", write_table(tmp_path / "a.csv", (20, 20))]
    result = run("solve", "--config", name, *options, "--tol=1e-2")
    if result.code:
        refused(result, "has no full-batch solver|is solved with an L2 penalty")
        assert re.search("perceptron|hinge|sparse", name)


def test_the_default_penalty_is_said(run: Run) -> None:
    result = run("solve", "--run=d")
    assert "no penalty given, so l2 with strength 0.001" in result.out
    assert load_head("d").info["penalty"] == {"name": "l2", "strength": 0.001}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.loss=perceptron " + "--num=2", "perceptron loss has no full-batch solver"),
        ("--model.loss=hinge --model.penalty={name: l1, strength: 0.1}", "hinge loss is solved with an L2 penalty"),
        ("--model.loss=cross_entropy", "did you mean 'softmax'"),
        ("--tol=0", "tol is a positive number"),
        ("--tol=small", "--tol: "),
        ("--tol=1e-9 --max_passes=3", "the gap is .* after .* passes, but --tol is 1e-09: give a larger --max_passes"),
        ("--folds=3", "--folds chooses a strength, which needs --path"),
        ("--path --folds=1", "folds is at least 2"),
        ("--path --num=0", "num=0"),
        ("--path --data.val_fraction=0", "the data have none: give --folds 5"),
        ("--path --criterion=auc", "--criterion: "),
        ("--trainer.max_epoch=3", "did you mean"),
        ("--toll=3", r"solve has no option --toll \(did you mean '--tol'\?\)"),
        ("--run=full", "full: not empty"),
        ("--device=tpu9", "--device tpu9: "),
        ("--resume=x", "solve has no option --resume"),
        ("--config=nothing", "no such file, and no configuration of that name"),
    ],
)
def test_wrong_arguments_are_one_line(run: Run, arguments: str, message: str) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    words = re.split(r" (?=--)", arguments)
    refused(run("solve", *words), message)


def test_help(run: Run) -> None:
    result = run("solve", "--help")
    assert result.code == 0
    assert "usage: torchlin solve [OPTIONS]" in result.out
    for option in ("--path", "--tol", "--folds", "--max_passes", "--model.penalty", "--run"):
        assert option in result.out
    assert "solve" in run("--help").out


def test_plot_path(tmp_path: Path) -> None:
    from torchlin import report

    x, y = train_split()
    for penalty, more in ((L1, {"validation": (x[-200:], y[-200:])}), (L2, {"folds": 2}), (L2, {})):
        path = solve_path(x[:300], y[:300], "softmax", penalty, num=4, **more)  # type: ignore[arg-type]
        axes = plot_path(path)
        panels = axes.child_axes
        assert len(panels) == 4
        objective, accuracy, nonzero, weights = (panel.get_lines() for panel in panels)
        assert list(objective[0].get_ydata()) == [s.objective for s in path.solutions]
        assert list(nonzero[0].get_ydata()) == list(path.nonzero)
        labels = [line.get_label() for line in accuracy[:2]]
        assert ("validation" in labels) == bool(path.val_accuracy)
        assert len(weights) >= 12
        report.save(axes, tmp_path / "path.png")
        assert Image.open(tmp_path / "path.png").size[0] > 800
        report.close(axes)
    _, own = plt.subplots()
    assert plot_path(path, own) is own
    report.close(own)
    axes = plot_gap(path.solutions[-1])
    assert axes.get_yscale() == "log"
    assert all(math.isfinite(v) for v in axes.get_lines()[0].get_ydata())
    report.close(axes)


def test_the_benchmark_of_solvers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = Path(__file__).parents[1] / "scripts" / "bench_solvers.py"
    monkeypatch.syspath_prepend(script.parent)
    picture = tmp_path / "solvers.png"
    problems = ["digits", "wide", "text", "classes", "cifar10"]
    words = ["--problems", *problems, "--scale", "0.02", "--limit", "0.3", "--threads", "1"]
    photos = write_photos(tmp_path / "photos", {f"train/{name}": 60 for name in ("cat", "cow", "dog")})
    monkeypatch.setattr("sys.argv", [str(script), *words, "--root", str(photos), "--output", str(picture)])
    runpy.run_path(str(script), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len([row for row in rows if "| torchlin |" in row]) == 10
    assert len([row for row in rows if "| saga |" in row]) == 5
    assert picture.stat().st_size > 10_000


def test_the_benchmark_of_large_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = Path(__file__).parents[1] / "scripts" / "bench_large.py"
    monkeypatch.syspath_prepend(script.parent)
    photos = write_photos(tmp_path / "photos", {f"train/{name}": 40 for name in ("cat", "cow", "dog")})
    words = ["--scale", "0.002", "--threads", "1", "--root", str(photos)]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 2 + 2 + 4 + 2 + 1
    assert float(rows[1][1]) <= 1e-6  # the error of an exact pass
    assert float(rows[3][1]) <= 1e-4  # every gap of the path
    monkeypatch.setattr("sys.argv", [str(script), "depth"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "unknown part 'depth'; known: pass, path, hinge, wide, mapped" in capsys.readouterr().err
