"""A run that is killed, and goes on: it ends with the weights and the numbers of a run that nobody interrupted."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Kill
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from processes import SECONDS, in_process
from safetensors.torch import load_file
from torch import Tensor
from training import RUN_FILES, quiet_trainer, write_photos

from torchlin import L1, LinearClassifier
from torchlin.cli import main
from torchlin.data import ImageFolderDataModule
from torchlin.data.loading import Loader

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
EPOCHS = 3
BATCHES = 8  # of at most 7, of 54 training images
PLAIN = ["--model.loss", "softmax"]
RICH = [
    "--model.loss={name: softmax, label_smoothing: 0.05}",
    "--model.penalty={name: l1, strength: 0.01}",
    "--model.class_weight=balanced",
    "--trainer.accumulate_grad_batches=2",
    "--data.flip=true",
    "--data.crop_padding=2",
    "--data.cache=false",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images, of which the classes have unequal numbers."""
    return write_photos(tmp_path_factory.mktemp("photos"), {"cat": 14, "dog": 20, "owl": 26}, (8, 8))


def command(photos: Path, run: Path, options: Sequence[str], save_every: float = 0) -> list[str]:
    common = ["--data=ImageFolderDataModule", f"--data.root={photos}", "--data.batch_size=7"]
    trainer = [f"--trainer.max_epochs={EPOCHS}", "--trainer.callbacks+=killing.Kill", "--trainer.accelerator=cpu"]
    return ["fit", *common, *trainer, f"--run={run}", f"--save_every={save_every}", *options]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str], float], Path]:
    """Runs that nobody interrupted, each made once."""
    made: dict[tuple[object, ...], Path] = {}

    def run(options: Sequence[str], save_every: float = 0) -> Path:
        key = (*options, save_every)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            in_process(folder, main, command(photos, folder / "run", options, save_every))
            made[key] = folder / "run"
        return made[key]

    return run


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same(run: Path, whole: Path) -> None:
    """Bit for bit: weights, metrics, optimizer and schedule."""
    assert {path.name for path in run.iterdir()} == RUN_FILES
    mine, theirs = (load_file(folder / "head.safetensors") for folder in (run, whole))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert rows_of(run) == rows_of(whole)
    assert len(rows_of(run)) == EPOCHS
    ends = [torch.load(folder / "checkpoint.ckpt", weights_only=True) for folder in (run, whole)]
    for key in ("optimizer_states", "lr_schedulers", "state_dict", "global_step", "epoch"):
        torch.testing.assert_close(*(end[key] for end in ends), rtol=0, atol=0)


LAST = BATCHES - 1
POINTS = [
    "sanity_check",
    "train_start",
    "batch_start:0:0",
    "batch_start:0:3",
    "batch_end:0:4",
    f"batch_end:0:{LAST}",
    "validation:0",
    "batch_end:1:0",
    "batch_start:1:6",
    f"batch_end:1:{LAST}",
    "validation:1",
    "epoch_end:1",
    "before_checkpoint:1",
    "batch_start:2:0",
    f"batch_start:2:{LAST}",
    "validation:2",
    "epoch_end:2",
    "fit_end",
    "writing:0",
    "writing:3",
    "writing:9",
]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("options", [PLAIN, RICH], ids=["plain", "rich"])
def test_killed_and_resumed(
    photos: Path, tmp_path: Path, whole: Callable[..., Path], options: list[str], point: str
) -> None:
    run = tmp_path / "run"
    in_process(tmp_path, main, command(photos, run, options), kill=point)
    assert not (run / "head.safetensors").exists()
    in_process(tmp_path, main, ["fit", "--resume", str(run)])
    assert_same(run, whole(options))


@pytest.mark.parametrize("point", ["batch_end:0:4", "batch_end:1:5", "validation:2"])
def test_killed_between_checkpoints(photos: Path, tmp_path: Path, whole: Callable[..., Path], point: str) -> None:
    """With the usual minute between checkpoints the steps since the last one are made again."""
    run = tmp_path / "run"
    in_process(tmp_path, main, command(photos, run, RICH, 60), kill=point)
    in_process(tmp_path, main, ["fit", "--resume", str(run)])
    assert_same(run, whole(RICH, 60))


def test_killed_again_and_again(photos: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    run = tmp_path / "run"
    in_process(tmp_path, main, command(photos, run, RICH), kill="batch_end:0:2")
    for point in ("batch_start:0:3", "writing:1", "batch_end:1:0", "epoch_end:1", "batch_end:2:6", "fit_end"):
        in_process(tmp_path, main, ["fit", "--resume", str(run), "--save_every=0"], kill=point)
    in_process(tmp_path, main, ["fit", "--resume", str(run), "--save_every=0"])
    assert_same(run, whole(RICH))


OTHERS = {
    "workers": ["--data.num_workers=1", "--data.flip=true", "--data.cache=false"],
    "adam, elastic net": ["--model.optimizer=adam", "--model.penalty={name: elastic_net, strength: 0.01, alpha: 0.5}"],
    "double": ["--trainer.precision=64-true", "--model.class_weight=balanced"],
    "constant rate": ["--model.schedule=constant", "--model.lr=0.001"],
    "validation in between": ["--trainer.val_check_interval=5"],
    "validation by steps": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=5"],
    "validation now and then": ["--trainer.check_val_every_n_epoch=2"],
    "part of an epoch": ["--trainer.limit_train_batches=0.9"],
}
AT = [(name, point) for name in OTHERS for point in ("batch_start:0:2", "batch_start:1:6")]
# Where Lightning, from a checkpoint of that moment, would leave out a validation or the end of an epoch.
AT += [(name, point) for name in OTHERS if "validation" in name for point in ("validation:1", "epoch_end:1")]


@pytest.mark.parametrize(("name", "point"), AT)
def test_other_options(photos: Path, tmp_path: Path, whole: Callable[..., Path], name: str, point: str) -> None:
    run = tmp_path / "run"
    in_process(tmp_path, main, command(photos, run, OTHERS[name]), kill=point)
    in_process(tmp_path, main, ["fit", "--resume", str(run)])
    assert_same(run, whole(OTHERS[name]))


def test_the_command_itself(photos: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    """`python -m torchlin`, as a user types it."""
    run = tmp_path / "run"
    paths = [str(TESTS.parent), str(TESTS), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for arguments, kill in ((command(photos, run, RICH), "batch_start:1:4"), (["fit", "--resume", str(run)], "never")):
        done = subprocess.run(
            [sys.executable, "-m", "torchlin", *arguments],
            env={**environment, "KILL": kill},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == (0 if kill == "never" else -signal.SIGKILL), done.stderr
    assert_same(run, whole(RICH))


# A user's own script: bare loaders, Lightning's own checkpoints.


class Seen(Callback):
    """Remembers the batches of a run, and may kill it."""

    def __init__(self) -> None:
        self.positions: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.positions.append((trainer.current_epoch, batch[1].tolist()))


class Logged(Checkpoint):  # such callbacks come after the module
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows[trainer.current_epoch] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def script(photos: str, folder: str, every: int, resume: str | None) -> None:
    data = ImageFolderDataModule(photos, batch_size=7, flip=True, crop_padding=1)
    data.setup("fit")
    model = LinearClassifier(data.in_features, data.num_classes, penalty=L1(0.001), lr=0.01)
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    logged, seen = Logged(), Seen()
    trainer = quiet_trainer(EPOCHS, [seen, saved, logged, Kill()])
    loader = data.train_dataloader()
    assert isinstance(loader, Loader)
    trainer.fit(model, loader, data.val_dataloader(), ckpt_path=resume, weights_only=True)
    head = model.to_head()
    result = {"weight": head.weight.detach(), "bias": head.bias.detach(), "seen": seen.positions, "rows": logged.rows}
    torch.save(result, f"{folder}/result.pt")


@pytest.mark.parametrize("every", [3, BATCHES])
def test_a_script_with_bare_loaders_and_lightnings_checkpoints(photos: Path, tmp_path: Path, every: int) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    in_process(tmp_path, script, str(photos), str(tmp_path / "whole"), every, None)
    in_process(tmp_path, script, str(photos), str(tmp_path / "killed"), every, None, kill="batch_start:1:5")
    (newest,) = [p for p in (tmp_path / "killed").glob("*.ckpt") if p.stem == f"step={12 if every == 3 else BATCHES}"]
    in_process(tmp_path, script, str(photos), str(tmp_path / "killed"), every, str(newest))
    whole, resumed = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "killed"))
    done = int(newest.stem.removeprefix("step="))
    assert resumed["seen"] == whole["seen"][done:]
    for name in ("weight", "bias"):
        assert isinstance(whole[name], Tensor)
        assert torch.equal(resumed[name], whole[name])
    for epoch, row in resumed["rows"].items():
        for name in ("train_accuracy", "val_loss", "val_accuracy", "train_loss", "train_objective"):
            # The batches before the checkpoint are added up apart from those behind it.
            assert row[name] == pytest.approx(whole["rows"][epoch][name], rel=1e-6), (epoch, name)
    assert 2 in resumed["rows"]
