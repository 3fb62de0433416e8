"""The command line: what each command does and prints, and one line for everything a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Result, Run, refused
from training import RUN_FILES, Raise, write_photos, write_table

import torchlin
from torchlin import LinearClassifier, LinearHead, load_head
from torchlin.cli import COMMANDS, main
from torchlin.cli.configs import config_names

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")


FEW = ["--trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `torchlin fit` has made runs/digits-hinge-1; copied, never changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("digits"))
        assert main(["fit", "--model.loss=hinge", "--model.penalty={name: l1, strength: 0.001}", *FEW]) == 0
        return Path.cwd()


@pytest.fixture
def made(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits / "runs", tmp_path / "runs")
    return Path("runs/digits-hinge-1")


# Without a command.


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_configuration(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 0
    assert not result.err
    for word in (*COMMANDS, *config_names(), "--data.root", "--resume"):
        assert word in result.out


def test_an_unknown_command_suggests_the_nearest(run: Run) -> None:
    known = "fit, solve, probe, validate, test, predict"
    refused(run("fti"), rf"unknown command 'fti' \(did you mean 'fit'\?\); known: {known}")


def in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchlin", *arguments]
    path = {"PYTHONPATH": str(Path(torchlin.__file__).parents[1])}
    return subprocess.run(command, cwd=folder, env=os.environ | path, capture_output=True, text=True, check=True)


def test_the_package_is_the_command(tmp_path: Path) -> None:
    done = in_a_process(tmp_path, "--version")
    assert done.stdout.strip() == torchlin.__version__
    assert not done.stderr


def test_data_are_known_by_name_in_a_process_that_named_none_before(tmp_path: Path) -> None:
    table = write_table(tmp_path / "taste.csv")
    in_a_process(tmp_path, "fit", *FEW, "--data=FeaturesDataModule", f"--data.path={table}", "--run=mine")
    config = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    assert config["data"]["class_path"] == "torchlin.data.FeaturesDataModule"


def test_help_of_fit_shows_what_a_newcomer_needs(run: Run) -> None:
    result = run("fit", "--help")
    assert result.code == 0
    top = result.out[:1000]
    assert "usage: torchlin fit [OPTIONS]" in top
    for words in ("--data.root FOLDER", "--model.loss hinge", "{name: l1, strength: 0.001}", "--trainer.max_epochs"):
        assert words in " ".join(top.split())
    for option in ("--model.loss", "--model.penalty", "--model.lr", "--run", "--resume", "--data"):
        assert option in result.out
    assert run("predict", "--help").code == 0


# fit, test, validate.


def test_fit_trains_on_digits_and_says_what_came_out(run: Run, tmp_path: Path) -> None:
    result = run("fit", *FEW)
    assert result.code == 0
    folder = tmp_path / "runs" / "digits-softmax-1"
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    out = " ".join(result.out.split())
    assert "choose by validation" in out
    metrics = load_head(folder).info["metrics"]
    for label, split, size in (("train", "train", 1293), ("validation", "val", 144), ("test", "test", 360)):
        assert f"│ {label} │ {size} │ {metrics[split + '_loss']:.4f} │ {metrics[split + '_accuracy']:.4f} │" in out
    rows = re.findall(r"│ (train|validation|test) ", result.out)
    assert rows == ["train", "validation", "test"]
    assert str(Path("runs/digits-softmax-1")) in out
    assert "next: torchlin predict --run" in out
    assert all(name in out for name in RUN_FILES)
    assert max(map(len, result.out.replace("\r", "\n").splitlines()[:9])) <= 80
    assert re.search(r"val_accuracy: 0\.\d{3}", result.out)  # not broken into two lines

    LinearClassifier.load_from_checkpoint(folder / "checkpoint.ckpt", weights_only=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert list(config) == ["seed_everything", "trainer", "model", "data"]
    assert config["seed_everything"] == 0
    assert config["data"]["class_path"] == "torchlin.data.DigitsDataModule"

    again = run("fit", "--config", folder / "config.yaml", "--run", "again")
    assert again.code == 0
    for name in ("head.safetensors", "metrics.csv", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert load_head("again").info == load_head(folder).info


@pytest.mark.slow
def test_digits_reach_their_accuracy_without_options(run: Run) -> None:
    assert run("fit").code == 0
    assert load_head("runs/digits-softmax-1").info["metrics"]["test_accuracy"] >= 0.955


@pytest.mark.slow
def test_fit_is_quiet_on_standard_error(tmp_path: Path) -> None:
    table = write_table(tmp_path / "taste.csv", (40, 3))
    done = in_a_process(tmp_path, "fit", *FEW, "--data.path", str(table), "--data.val_fraction=0")
    warning, rate = done.stderr.splitlines()
    assert warning.startswith("torchlin: warning: the largest class has 40 training samples, the smallest 3: consider")
    assert re.match(r"torchlin: lr=[\d.e-]+, derived from the softmax loss", rate)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.penalty", "{name: elastic_net, strength: 0.125, alpha: 0.25}"],
        ["--model.penalty.name=elastic_net", "--model.penalty.strength=0.125", "--model.penalty.alpha=0.25"],
    ],
    ids=["mapping", "keys"],
)
def test_a_penalty_is_given_as_a_mapping_or_key_by_key(run: Run, arguments: list[str]) -> None:
    assert run("fit", *FEW, *arguments, "--model.class_weight=balanced", "--run=mine").code == 0
    assert load_head("mine").info["penalty"] == {"name": "elastic_net", "strength": 0.125, "alpha": 0.25}


def test_a_dry_run_leaves_nothing(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--trainer.fast_dev_run=true").code == 0
    assert not list(tmp_path.iterdir())


def test_test_and_validate_measure_the_newest_run_or_the_one_named(run: Run, made: Path) -> None:
    first = json.loads((made / "head.json").read_text())
    recorded = dict(first["metrics"])
    first["metrics"] = {}
    (made / "head.json").write_text(json.dumps(first))
    assert run("fit", *FEW).code == 0
    for arguments in (["--run", str(made)], ["--run=digits-hinge-1"]):
        result = run("test", *arguments)
        assert result.code == 0
        assert "digits-hinge-1, test split" in result.out
        assert f"│ test_accuracy │ {recorded['test_accuracy']:.4f} │" in " ".join(result.out.split())
    for name in ("test_loss", "test_accuracy", "test_balanced_accuracy"):
        assert load_head(made).info["metrics"][name] == pytest.approx(recorded[name])
    result = run("test")
    assert "digits-softmax-1, test split" in result.out
    result = run("validate")
    assert "digits-softmax-1, val split" in result.out
    assert "val_accuracy" in result.out


def test_balanced_class_weights_hold_for_test_too(run: Run, tmp_path: Path) -> None:
    table, other = write_table(tmp_path / "a.csv", (50, 20)), write_table(tmp_path / "b.csv", (10, 20))
    options = ["--data.path", table, "--data.test_path", other, "--model.class_weight=balanced", "--run=mine"]
    assert run("fit", *FEW, *options).code == 0
    before = load_head("mine").info["metrics"]
    assert run("test", "--run=mine").code == 0
    assert load_head("mine").info["metrics"] == pytest.approx(before)


def test_data_are_chosen_by_the_option_that_only_they_have(run: Run, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "my photos", {"train/cat": 9, "train/dog": 9, "test/dog": 3})
    result = run("fit", *FEW, "--data.root", photos, "--data.color=gray")
    assert result.code == 0
    assert "--run 'runs/my photos-softmax-1' IMAGES" in result.out
    assert load_head("runs/my photos-softmax-1").info["class_names"] == ["cat", "dog"]

    result = run("fit", *FEW, f"--data.path={write_table(tmp_path / 'taste.csv')}", "--model.loss=logistic")
    assert result.code == 0
    info = load_head("runs/taste-logistic-1").info
    assert info["input"]["feature_names"] == ["f0", "f1", "f2"]
    assert "│ test │ 0 │ none │ none │" in " ".join(result.out.split())
    assert "next: torchlin validate" in result.out
    refused_run = run("test", "--run=taste-logistic-1")
    assert refused_run.code == 2
    assert "have no test split" in refused_run.err

    trainer_only = tmp_path / "mine.yaml"
    trainer_only.write_text("trainer: {max_epochs: 1}\n")
    assert run("fit", "--config", trainer_only, "--data.root", photos, "--run=third").code == 0
    assert load_head("third").info["data"]["name"] == "my photos"


# Interruption.


@contextmanager
def ctrl_c(epoch: int, batch: int) -> Iterator[None]:
    """Press Ctrl-C after a batch of an epoch."""
    callback, original = Raise(KeyboardInterrupt(), epoch, batch), LinearClassifier.on_train_batch_end

    def pressed(self: LinearClassifier, outputs: Any, batch: Any, batch_idx: int) -> None:
        original(self, outputs, batch, batch_idx)
        callback.on_train_batch_end(self.trainer, self, outputs, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearClassifier, "on_train_batch_end", pressed)
        yield


@pytest.mark.parametrize("epoch", [0, 2])
def test_ctrl_c_leaves_a_run_that_resume_finishes(run: Run, tmp_path: Path, epoch: int) -> None:
    options = ["--trainer.max_epochs=3", "--model.penalty={name: l1, strength: 0.001}"]
    assert run("fit", *options, "--run=whole").code == 0
    with ctrl_c(epoch, 4):
        assert run("fit", *options, "--run=part").code == 130
    assert {"head.safetensors", "head.json", "checkpoint.ckpt", "config.yaml", "templates.png"} <= {
        path.name for path in (tmp_path / "part").iterdir()
    }
    assert load_head("part").info["interrupted"]
    assert run("test", "--run=part").code == 0

    result = run("fit", "--resume", "part")
    assert result.code == 0
    assert "choose by validation" in result.out
    assert (tmp_path / "part" / "head.safetensors").read_bytes() == (tmp_path / "whole/head.safetensors").read_bytes()
    assert load_head("part").info == load_head("whole").info


# What a user can get wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.los=hinge", "fit has no option --model.los .did you mean '--model.loss'.*torchlin fit --help"),
        ("--trainer.max_epoch=3", "did you mean '--trainer.max_epochs'"),
        ("--trainer.max_epochs=two", "--trainer.max_epochs: expected int, got two"),
        ("--trainer.accelerator=tpux", "--trainer: .*tpux"),
        ("--model.lr=fast", "--model.lr: expected float, got fast"),
        ("--model.lr=0", "lr is a positive number, got 0"),
        ("--model.loss=cross_entropy", "unknown loss 'cross_entropy' .did you mean 'softmax'"),
        ("--model.loss=svm", "did you mean 'hinge'"),
        ("--model.loss={name: hinge, margn: 2}", "did you mean 'margin'"),
        ("--model.loss=logistic", "separates 2 classes, but there are num_classes=10"),
        ("--model.penalty=l1", "penalty 'l1' needs strength"),
        ("--model.penalty={name: l2, strength: -1}", "≥ 0, got -1"),
        ("--model.penalty={name: elastic_net, strength: 1, alpha: 2}", "between 0 and 1, got 2"),
        ("--model.optimizer=lbfgs", "unknown optimizer 'lbfgs'"),
        ("--model.schedule=cosin", "did you mean 'cosine'"),
        ("--model.class_weight=[1, 2]", "class_weight has 2 entries for num_classes=10"),
        ("--data=ImageFoldrDataModule", "got ImageFoldrDataModule .did you mean 'ImageFolderDataModule'"),
        ("--data=ImageFolderDataModule", "ImageFolderDataModule needs --data.root FOLDER"),
        ("--data=FeaturesDataModule", "FeaturesDataModule needs --data.path FILE"),
        ("--config=cifar10-softmax", "ImageFolderDataModule needs --data.root FOLDER"),
        ("--config=cifar10-softmx", "--config cifar10-softmx: .*did you mean 'cifar10-softmax'"),
        ("--config=bad.yaml", "bad.yaml: no configuration"),
        ("--data=DigitsDataModule --data.root=photos", "DigitsDataModule has no option --data.root"),
        ("--data.batch_size=0", "batch_size must be an integer of at least 1, got 0"),
        ("--data.root=photos --data.color=blue", "--data.color: expected 'rgb', 'gray', got blue"),
        ("--data.root=photoz", "photoz/: no such folder .did you mean 'photos'"),
        ("--data.root=nothing", "nothing/: no class folders and no images"),
        ("--data.root=hollow", "no images found in class folder 'dog'"),
        ("--data.root=broken", "1.png: not an image"),
        ("--data.root=stranger", "class 'bird' is not among the 2 training classes"),
        ("--data.path=nan.npz", "nan.npz"),
        ("--data.path=word.csv", "word.csv"),
        ("--data.root=photos --model.lr=1e38 --model.loss=hinge", r"diverged at step \d+ .*lr=1e\+38; leave lr out"),
        ("--run=photos", "photos: not empty; .*--run.*--resume photos"),
        ("--run=nan.npz", "nan.npz: is a file"),
        ("--run=nan.npz/below", "cannot be written to .*choose another folder with --run"),
        ("--resume=nowhere", "nowhere: no such run folder"),
        ("--resume=photos", "photos: holds no config.yaml, so it is not a run"),
        ("stray", "unrecognized arguments: stray"),
    ],
)  # fmt: skip
def test_bad_input_to_fit_is_one_line(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    write_photos(tmp_path / "photos", {"cat": 6, "dog": 6})
    write_photos(tmp_path / "hollow", {"cat": 2, "dog": 0})
    write_photos(tmp_path / "broken", {"cat": 3, "dog": 3})
    (tmp_path / "broken/dog/1.png").write_text("not a picture")
    write_photos(tmp_path / "stranger", {"train/cat": 2, "train/dog": 2, "test/bird": 1})
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad.yaml").write_text("model: {loss: [")
    np.savez(tmp_path / "nan.npz", features=np.array([[1.0, np.nan], [2.0, 1.0]]), target=np.array([0, 1]))
    (tmp_path / "word.csv").write_text("a,target\n1,0\nmany,1\n")
    before = sorted(tmp_path.rglob("*"))
    words = re.split(r" (?=--)", arguments)
    refused(run("fit", *words), message)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] in ([], [tmp_path / "runs"])


@pytest.mark.parametrize("command", ["test", "validate"])
def test_measuring_needs_a_run(run: Run, command: str) -> None:
    refused(run(command), "runs: holds no finished run; train one with `torchlin fit`")
    refused(run(command, "--run=nowhere"), "nowhere: no such run folder")
    Path("empty").mkdir()
    refused(run(command, "--run=empty"), "empty: holds no config.yaml, so it is not a run")


def _fails(result: Result, message: str) -> None:
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert re.search(message, result.err), result.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("head.safetensors", b"\x00\x01", "head.safetensors: damaged"),
        ("head.safetensors", None, "holds no head.safetensors, so it is not a finished run"),
        ("head.json", b'{"format": 1', "head.json: damaged"),
        ("head.json", b'{"format": 99}', "format 99, this torchlin reads format 1: update torchlin"),
        ("head.json", None, "holds no head.json, so it is not a finished run"),
        ("config.yaml", None, "holds no config.yaml, so it is not a run"),
        ("config.yaml", b"model: [", "config.yaml: no configuration"),
        ("config.yaml", b"\xff\xfe", "config.yaml: no configuration"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_one_line(run: Run, made: Path, name: str, content: bytes | None, message: str) -> None:
    (made / name).unlink() if content is None else (made / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    _fails(run("test", "--run", made), message)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_run_measured_on_other_classes_is_an_error(run: Run, made: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", {"train/cat": 6, "train/dog": 6, "test/dog": 2})
    result = run("test", "--run", made, "--data=ImageFolderDataModule", "--data.root", photos)
    _fails(result, r"trained on 10 classes \(0, 1, 2, 3, 4, …\), but the data have 2 \(cat, dog\)")
    options = ["--data.root", photos, "--model.loss=hinge", "--run=cats"]
    assert run("fit", *FEW, *options).code == 0
    other = write_photos(tmp_path / "large", {"train/cat": 6, "train/dog": 6, "test/dog": 2}, size=(5, 5))
    _fails(run("test", "--run=cats", "--data.root", other), "trained on 36 features, but the data have 75")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", None], ids=["empty", "cut", "missing"])
def test_a_damaged_checkpoint_cannot_be_resumed(run: Run, made: Path, content: bytes | None) -> None:
    checkpoint = made / "checkpoint.ckpt"
    checkpoint.unlink() if content is None else checkpoint.write_bytes(content)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    message = "checkpoint.ckpt: damaged" if content is not None else "holds no checkpoint.ckpt, so there is nothing"
    _fails(run("fit", "--resume", made), message)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_checkpoint_of_other_classes_cannot_be_resumed(run: Run, made: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    table = write_table(tmp_path / "taste.csv", features=64)
    result = run("fit", "--resume", made, "--data=FeaturesDataModule", "--data.path", table)
    _fails(result, "checkpoint.ckpt: trained with num_classes=10, but now it is 2")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_checkpoint_that_would_run_code_is_refused(run: Run, made: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"hyper_parameters": Evil()}, made / "checkpoint.ckpt")
    _fails(run("fit", "--resume", made), "checkpoint.ckpt: damaged")
    assert not (tmp_path / "touched").exists()


def test_a_run_of_a_script_says_that_it_names_no_data(run: Run, tmp_path: Path) -> None:
    from training import KnownBlobs, quiet_trainer

    from torchlin import RunFolder

    quiet_trainer(1, [RunFolder("mine")]).fit(LinearClassifier(5, 3), KnownBlobs())
    _fails(run("test", "--run=mine"), "mine: its config.yaml names no data, as a script made it: name them with --data")
    table = write_table(tmp_path / "a.csv", (9, 9, 9), features=5)
    assert run("test", "--run=mine", "--data.path", table, "--data.test_path", table).code == 0


def test_a_bug_shows_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class BugError(Exception):
        pass

    def bug(*args: Any) -> None:
        try:
            Path("nowhere/at/all").read_text()
        except OSError:
            raise BugError from None

    monkeypatch.setattr("torchlin.cli.predict.load_head", bug)
    monkeypatch.setattr("torchlin.cli.predict.newest_run", lambda: Path("runs"))
    with pytest.raises(BugError):
        run("predict", "x.png")
    monkeypatch.setattr("torchlin.cli.predict.load_head", lambda path: None)  # head.info then fails inside torchlin
    with pytest.raises(AttributeError):
        run("predict", "x.png")
    monkeypatch.setattr("torchlin.cli.predict.load_head", lambda path: LinearHead(3, 2))
    monkeypatch.setattr("torchlin.cli.predict.predict_images", lambda *args, **options: None)
    with pytest.raises(TypeError):  # the rows, which are none, cannot be written
        run("predict", "x.png")


def test_a_loss_of_the_users_own_by_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mylosses.py").write_text(
        "from torchlin import SoftmaxLoss\n\n\nclass Tempered(SoftmaxLoss):\n    name = 'tempered'\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["fit", "--model.loss", "mylosses.Tempered", "--trainer.max_epochs", "1", "--run", "own"]) == 0
    assert load_head("own").info["loss"] == {"name": "mylosses.Tempered"}
    assert main(["fit", "--model.loss", "nomodule.Tempered"]) == 2
    assert "nomodule.Tempered: nomodule cannot be imported" in capsys.readouterr().err
