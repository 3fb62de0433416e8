"""Run folders: what is in one, what never is, and going on where a run was interrupted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from training import RUN_FILES, Blobs, KnownBlobs, Raise, quiet_trainer

from torchlin import L1, DivergenceError, LinearClassifier, RunFolder, SoftmaxLoss, load_head
from torchlin.data import DigitsDataModule
from torchlin.data.loading import ArrayDataset, BatchSampler, Loader
from torchlin.folder import find_run, newest_run, number_folder

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*", "ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def info_of(folder: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    return info


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# What a run folder is.


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "run"
    trainer = quiet_trainer(3, [RunFolder(folder)])
    model, data = LinearClassifier(64, 10, loss={"name": "hinge", "margin": 2.0}, penalty=L1(0.001)), DigitsDataModule()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return folder


def test_a_run_holds_exactly_its_files(digits_run: Path) -> None:
    assert files(digits_run) == RUN_FILES


def test_the_head_on_disk_and_its_record(digits_run: Path) -> None:
    tensors = load_file(digits_run / "head.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "weight": (10, 64),
        "bias": (10,),
        "mean": (64,),
        "std": (64,),
    }
    data = DigitsDataModule()
    data.setup()
    torch.testing.assert_close(tensors["mean"], data.standardization.mean)
    torch.testing.assert_close(tensors["std"], data.standardization.std)

    info = info_of(digits_run)
    metrics = info.pop("metrics")
    assert info.pop("torchlin")
    assert info == {
        "format": 1,
        "class_names": [str(digit) for digit in range(10)],
        "in_features": 64,
        "num_classes": 10,
        "input": {"kind": "pixels", "shape": [1, 8, 8], "color": "gray", "image_size": None, "resize": None},
        "loss": {"name": "hinge", "margin": 2.0},
        "penalty": {"name": "l1", "strength": 0.001},
        "data": {"name": "digits", "fingerprint": data.fingerprint, "sizes": data.sizes},
        "epochs": 3,
        "steps": 33,
        "interrupted": False,
    }
    assert {f"{split}_{what}" for split in ("train", "val", "test") for what in ("loss", "accuracy")} <= set(metrics)

    head = load_head(digits_run)
    assert head.info["metrics"] == metrics
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert isinstance(loader, DataLoader)
        hits = torch.cat([head.predict(x) == y for x, y in loader])
        assert float(hits.double().mean()) == pytest.approx(metrics[f"{split}_accuracy"])


def test_metrics_have_a_row_per_epoch(digits_run: Path) -> None:
    rows = rows_of(digits_run)
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "11"), ("1", "22"), ("2", "33")]
    assert set(rows[0]) == {
        "epoch",
        "step",
        "train_loss",
        "train_accuracy",
        "train_objective",
        "nonzero",
        "val_loss",
        "val_accuracy",
        "val_balanced_accuracy",
    }
    recorded = info_of(digits_run)["metrics"]
    assert {name: float(value) for name, value in rows[-1].items() if name in recorded} == {
        name: recorded[name] for name in rows[-1] if name in recorded
    }
    assert all(float(row["train_objective"]) > float(row["train_loss"]) for row in rows)


def test_the_checkpoint_holds_plain_values_and_loads_without_the_command_line(digits_run: Path) -> None:
    saved = torch.load(digits_run / "checkpoint.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["loss"] == {"name": "hinge", "margin": 2.0}
    model = LinearClassifier.load_from_checkpoint(digits_run / "checkpoint.ckpt", weights_only=True)
    head = load_head(digits_run)
    assert torch.equal(model.to_head().weight, head.weight)
    assert torch.equal(model.to_head().bias, head.bias)


@pytest.mark.parametrize("name", ["templates.png", "curves.png", "confusion.png"])
def test_the_pictures_show_something(digits_run: Path, name: str) -> None:
    with Image.open(digits_run / name) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10


def test_the_configuration_names_the_classifier(digits_run: Path) -> None:
    config = yaml.safe_load((digits_run / "config.yaml").read_text())
    assert LinearClassifier(64, 10, **config["model"]).hparams["loss"] == {"name": "hinge", "margin": 2.0}


# Scripts of users.


def test_a_data_module_of_ones_own_gets_the_same_folder(tmp_path: Path) -> None:
    trainer = quiet_trainer(2, [RunFolder(tmp_path / "mine")])
    model, data = LinearClassifier(5, 3), Blobs()
    trainer.fit(model, data)
    assert files(tmp_path / "mine") == RUN_FILES
    head = load_head(tmp_path / "mine")
    assert head.info["class_names"] == ["0", "1", "2"]
    assert head.info["input"] == {"kind": "features", "shape": [5]}
    torch.testing.assert_close(head(data.test[0]), model(data.test[0]))
    assert "test_accuracy" not in head.info["metrics"]
    (tested,) = trainer.test(model, data, verbose=False)
    assert load_head(tmp_path / "mine").info["metrics"]["test_accuracy"] == tested["test_accuracy"]


def test_without_a_path_runs_are_numbered(tmp_path: Path) -> None:
    for expected in ("data-hinge-1", "data-hinge-2"):
        callback = RunFolder()
        quiet_trainer(1, [callback]).fit(LinearClassifier(5, 3, loss="hinge"), Blobs())
        assert callback.path == Path("runs") / expected
    assert files(tmp_path / "runs" / "data-hinge-2") == RUN_FILES


def test_numbers_go_on_after_the_largest(tmp_path: Path) -> None:
    for name in ("a-b-2", "a-b-10", "a-b-c-30", "a-b-x", "a-40"):
        (tmp_path / "r" / name).mkdir(parents=True)
    assert number_folder("a-b", tmp_path / "r").name == "a-b-11"
    assert number_folder("a-b", tmp_path / "r").name == "a-b-12"
    assert number_folder("new", tmp_path / "r").name == "new-1"


def test_a_test_without_a_model_takes_the_run_or_the_best_of_a_checkpoint_beside_it(tmp_path: Path) -> None:
    data = KnownBlobs()
    trainer = quiet_trainer(2, [RunFolder(tmp_path / "alone")])
    trainer.fit(LinearClassifier(5, 3), data)
    (tested,) = trainer.test(datamodule=data, verbose=False)
    assert info_of(tmp_path / "alone")["metrics"]["test_loss"] == tested["test_loss"]

    worst = ModelCheckpoint(tmp_path / "worst", monitor="train_loss", mode="max")  # the first epoch, not the last
    trainer = quiet_trainer(4, [RunFolder(tmp_path / "beside"), worst])
    model = LinearClassifier(5, 3)
    trainer.fit(model, data)
    assert [path.name for path in (tmp_path / "worst").iterdir()] == ["epoch=0-step=5.ckpt"]
    assert files(tmp_path / "beside") == RUN_FILES
    (last,) = trainer.test(model, data, verbose=False)
    (first,) = trainer.test(datamodule=data, ckpt_path="best", verbose=False)
    assert first["test_loss"] > last["test_loss"] == info_of(tmp_path / "beside")["metrics"]["test_loss"]


def test_early_stopping_and_another_logger_stay_what_they_are(tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", patience=0, min_delta=10.0)
    logger = CSVLogger(tmp_path / "logs")
    callbacks = [RunFolder(tmp_path / "run"), stop]
    quiet_trainer(50, callbacks, logger=logger, log_every_n_steps=1).fit(LinearClassifier(5, 3), KnownBlobs())
    assert info_of(tmp_path / "run")["epochs"] == len(rows_of(tmp_path / "run")) == 2
    assert not info_of(tmp_path / "run")["interrupted"]
    assert (Path(logger.log_dir) / "metrics.csv").is_file()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(1, [RunFolder(tmp_path / "run")], fast_dev_run=True)
    model = LinearClassifier(5, 3)
    trainer.fit(model, KnownBlobs())
    trainer.test(model, KnownBlobs(), verbose=False)
    assert not (tmp_path / "run").exists()


def test_measuring_alone_writes_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(1, [RunFolder(tmp_path / "run")])
    model = LinearClassifier(5, 3)
    trainer.validate(model, KnownBlobs(), verbose=False)
    trainer.test(model, KnownBlobs(), verbose=False)
    assert not (tmp_path / "run").exists()


class Odd(Blobs):
    """Two lists where one loader would do, ignored labels, and no validation to speak of."""

    def val_dataloader(self) -> Any:
        self.val[1][3:7] = -100
        return [self._loader(self.val)]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_odd_loaders_and_precisions_end_in_a_complete_run(
    tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Odd(dtype=torch.float64 if precision == "64-true" else torch.float32)
    drawn: list[Tensor] = []
    monkeypatch.setattr("torchlin.report.plot_confusion", lambda matrix, names: drawn.append(matrix) or Figure().gca())
    trainer = quiet_trainer(1, [RunFolder(tmp_path / "run")], precision=precision)
    trainer.fit(LinearClassifier(5, 3), data)
    assert files(tmp_path / "run") == RUN_FILES
    assert [int(matrix.sum()) for matrix in drawn] == [25 - 4]
    load_head(tmp_path / "run")


class NoVal(Blobs):
    def val_dataloader(self) -> Any:
        return []


def test_without_validation_there_is_no_confusion_matrix(tmp_path: Path) -> None:
    quiet_trainer(1, [RunFolder(tmp_path / "run")]).fit(LinearClassifier(5, 3), NoVal())
    assert files(tmp_path / "run") == RUN_FILES - {"confusion.png"}


def test_an_epoch_without_validation_has_no_old_values(tmp_path: Path) -> None:
    trainer = quiet_trainer(3, [RunFolder(tmp_path / "run")], check_val_every_n_epoch=2)
    trainer.fit(LinearClassifier(5, 3), KnownBlobs())
    assert ["val_loss" in row and bool(row["val_loss"]) for row in rows_of(tmp_path / "run")] == [False, True, False]
    # What the last validation said is kept.
    kept = info_of(tmp_path / "run")["metrics"]["val_loss"]
    assert kept == pytest.approx(float(rows_of(tmp_path / "run")[1]["val_loss"]))


class LogsNaN(LinearClassifier):
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("mine", float("nan"))


def test_a_metric_of_ones_own_may_be_nan(tmp_path: Path) -> None:
    quiet_trainer(1, [RunFolder(tmp_path / "run")]).fit(LogsNaN(5, 3), KnownBlobs())
    assert "mine" not in info_of(tmp_path / "run")["metrics"]
    assert rows_of(tmp_path / "run")[0]["mine"] == "nan"


class Named(KnownBlobs):
    class_names = ("lion", "tiger")


def test_names_that_do_not_match_are_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data have 2 class_names, this classifier num_classes=3"):
        quiet_trainer(1, [RunFolder(tmp_path / "run")]).fit(LinearClassifier(5, 3), Named())
    assert not (tmp_path / "run").exists()


def test_a_run_folder_needs_a_head(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match="RunFolder writes the head of a LinearClassifier, got BoringModel"):
        quiet_trainer(1, [RunFolder(tmp_path / "run")]).fit(BoringModel())
    assert not (tmp_path / "run").exists()


# Where a run can be.


def _fit_into(folder: Path, *callbacks: Any, **options: Any) -> LinearClassifier:
    model = LinearClassifier(5, 3, **options)
    quiet_trainer(2, [RunFolder(folder), *callbacks]).fit(model, KnownBlobs())
    return model


def test_a_folder_that_is_not_empty_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _fit_into(tmp_path / "run")  # empty: fine
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"run: not empty; .*--run, or continue .* --resume .*run"):
        _fit_into(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run: is a file, a run needs a folder"):
        _fit_into(tmp_path / "run")
    with pytest.raises(ValueError, match=r"cannot be written to .*; choose another folder with --run"):
        _fit_into(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "mine"
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(ValueError, match="data-softmax-1: cannot be made"):
        quiet_trainer(1, [RunFolder()]).fit(LinearClassifier(5, 3), Blobs())


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # root, who may run this, is refused nothing
    with pytest.raises(ValueError, match=r"run: cannot be written to \(Permission denied\); choose another folder"):
        _fit_into(tmp_path / "run")


def test_a_run_that_fails_in_its_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    data = Blobs()
    data.train[0][40] = float("nan")
    with pytest.raises(DivergenceError):
        quiet_trainer(2, [RunFolder(tmp_path / "run")]).fit(LinearClassifier(5, 3, lr=0.01), data)
    with pytest.raises(RuntimeError, match="mine"):
        _fit_into(tmp_path / "run", Raise(RuntimeError("mine"), 0, 2))
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_later_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        _fit_into(tmp_path / "run", Raise(RuntimeError("mine"), 1, 2))
    assert files(tmp_path / "run") == {"checkpoint.ckpt", "config.yaml", "metrics.csv"}
    whole = _fit_into(tmp_path / "whole")
    resumed = LinearClassifier(5, 3)
    trainer = quiet_trainer(2, [RunFolder(tmp_path / "run", resume=True)])
    trainer.fit(resumed, KnownBlobs(), ckpt_path=tmp_path / "run" / "checkpoint.ckpt")
    assert torch.equal(resumed.to_head().weight, whole.to_head().weight)


# Interruption.


EPOCHS = 5
OPTIONS: dict[str, Any] = {"penalty": L1(0.01), "loss": SoftmaxLoss(label_smoothing=0.1), "class_weight": "balanced"}


class Shuffled(KnownBlobs):
    """Batches in an order that depends on the epoch, as torchlin's own data modules have it."""

    def train_dataloader(self) -> Any:
        dataset = ArrayDataset(*self.train)
        return Loader(dataset, self.batch_size, sampler=BatchSampler(len(dataset), self.batch_size, 0))


def _fit(callbacks: Any, checkpoint: Path | None = None) -> LinearClassifier:
    model = LinearClassifier(5, 3, **OPTIONS)
    quiet_trainer(EPOCHS, callbacks).fit(model, Shuffled(), ckpt_path=checkpoint, weights_only=True)
    return model


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 4), (2, 1), (2, 4), (4, 4)])
def test_ctrl_c_leaves_a_complete_run_that_goes_on_where_it_was(tmp_path: Path, epoch: int, batch: int) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        _fit([RunFolder(run), Raise(KeyboardInterrupt(), epoch, batch)])
    assert files(run) == RUN_FILES - (set() if epoch else {"metrics.csv", "curves.png", "confusion.png"})
    assert info_of(run)["interrupted"]
    assert info_of(run)["epochs"] == epoch
    assert load_head(run)(torch.zeros(2, 5)).isfinite().all()
    torch.load(run / "checkpoint.ckpt", weights_only=True)

    whole = _fit([RunFolder(tmp_path / "whole")])
    resumed = _fit([RunFolder(run, resume=True)], run / "checkpoint.ckpt")
    for name in ("weight", "bias"):
        assert torch.equal(getattr(resumed.to_head(), name), getattr(whole.to_head(), name))
    assert int((whole.to_head().weight == 0).sum()) > 0
    assert files(run) == RUN_FILES
    assert not info_of(run)["interrupted"]
    assert rows_of(run) == rows_of(tmp_path / "whole")
    assert info_of(run)["metrics"] == info_of(tmp_path / "whole")["metrics"]


def test_ctrl_c_before_training_leaves_nothing(tmp_path: Path) -> None:
    class Impatient(LinearClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        quiet_trainer(2, [RunFolder(tmp_path / "run")]).fit(Impatient(5, 3), KnownBlobs())
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_no_weight(tmp_path: Path) -> None:
    whole = _fit([RunFolder(tmp_path / "run")])
    again = _fit([RunFolder(tmp_path / "run", resume=True)], tmp_path / "run" / "checkpoint.ckpt")
    assert torch.equal(again.to_head().weight, whole.to_head().weight)
    assert len(rows_of(tmp_path / "run")) == EPOCHS


def test_a_failing_resume_deletes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        _fit([RunFolder(run), Raise(KeyboardInterrupt(), 0, 2)])
    before = files(run)
    with pytest.raises(RuntimeError, match="mine"):
        _fit([RunFolder(run, resume=True), Raise(RuntimeError("mine"), 0, 2)], run / "checkpoint.ckpt")
    assert files(run) == before
    with pytest.raises(ValueError, match="resume=True needs the path"):
        RunFolder(resume=True)


# Finding runs.


def test_the_newest_run_is_the_one_trained_last(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="runs: holds no finished run; train one with `torchlin fit`"):
        newest_run()
    trainer = quiet_trainer(1, [RunFolder("runs/b")])
    model = LinearClassifier(5, 3)
    trainer.fit(model, KnownBlobs())
    quiet_trainer(1, [RunFolder("runs/a")]).fit(LinearClassifier(5, 3), KnownBlobs())
    trainer.test(model, KnownBlobs(), verbose=False)  # writes into runs/b
    assert newest_run() == Path("runs/a")


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits-hinge-1").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert find_run("mine") == Path("mine")
    assert find_run("digits-hinge-1") == Path("runs/digits-hinge-1")
    with pytest.raises(FileNotFoundError, match=r"digits-hinge-2: no such run folder .did you mean 'digits-hinge-1'"):
        find_run("digits-hinge-2")


def test_a_callback_holds_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    quiet_trainer(1, [folder]).fit(LinearClassifier(5, 3), KnownBlobs())
    before = (tmp_path / "run" / "head.safetensors").read_bytes()
    with pytest.raises(ValueError, match="make a new one for another model"):
        quiet_trainer(1, [folder]).fit(LinearClassifier(5, 3, loss="hinge"), KnownBlobs())
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == before


def test_resuming_without_the_checkpoint_is_refused(tmp_path: Path) -> None:
    quiet_trainer(2, [RunFolder(tmp_path / "run")]).fit(LinearClassifier(5, 3), KnownBlobs())
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"needs the checkpoint of the run: trainer\.fit\(…, ckpt_path="):
        quiet_trainer(2, [RunFolder(tmp_path / "run", resume=True)]).fit(LinearClassifier(5, 3), KnownBlobs())
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_numbers_of_other_data_stay_out_of_the_run(tmp_path: Path) -> None:
    trainer = quiet_trainer(1, [RunFolder(tmp_path / "run")])
    model = LinearClassifier(5, 3)
    trainer.fit(model, KnownBlobs())
    trainer.test(model, KnownBlobs(), verbose=False)
    assert "test_loss" not in info_of(tmp_path / "run")["metrics"]
