"""`torchlin probe`: a linear head on the features of a frozen backbone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save

from torchlin.cli.fullbatch import FullBatchCLI
from torchlin.cli.training import completed
from torchlin.folder import (
    CONFIG,
    METRICS,
    finite,
    number_folder,
    open_folder,
    rows_to_csv,
    save_pictures,
    write_result,
)
from torchlin.probe import Backbone, LinearProbe, ProbeResult, Recipe, load_backbone
from torchlin.probe.attach import BACKBONE_FILE, own_weights
from torchlin.storage import replace_file

# What decides the result, and is kept in config.yaml beside the model and the data.
KEYS = (
    "backbone", "weights", "layer", "pooling", "select", "preprocess", "patches", "flip", "head", "recipe", "num",
    "ratio", "folds", "criterion", "tol", "max_passes", "features", "image_batch",
)  # fmt: skip
_MANY = 20  # classes beyond which only the worst are printed


def probe_run(rest: list[str]) -> None:
    """`torchlin probe` with the arguments `rest`."""
    ProbeCLI(["probe", *completed("probe", rest)], _Prober)


class _Prober(Trainer):
    """Gives the command its name."""

    def probe(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Train a linear head on the features of a frozen backbone."""


class ProbeCLI(FullBatchCLI):
    """The options of data, loss and penalty, and those of the backbone and of the way to the head."""

    backbone: Backbone

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"probe": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        add("--backbone", type=str, default="PatchFeatures", help="torchvision model, timm/NAME, import path, or this.")
        add("--weights", type=str | None, default=None, help="Name of its weights (DEFAULT), or a checkpoint.")
        add("--layer", type=str | None, default=None, help="Module to read (default: what the classifier gets).")
        add("--pooling", type=Literal["avg", "max", "cls", "flatten"], default="avg", help="Over places or tokens.")
        add("--select", type=str | None, default=None, help="Key or place in an output that is a dict or a tuple.")
        add("--preprocess", type=dict[str, Any] | None, default=None, help="{resize, crop, mean, std, interpolation}.")
        add("--patches", type=int, default=1600, help="Of PatchFeatures.")
        add("--flip", type=bool, default=True, help="PatchFeatures of an image and its mirror image are the same.")
        add("--head", type=Literal["solver", "sgd"], default="solver", help="Certified path of strengths, or SGD.")
        add("--recipe", type=Recipe, default=Recipe(), help="Of SGD.")
        add("--run", type=str | None, default=None, help="Run folder to write.")
        add("--num", type=int, default=14, help="How many strengths.")
        add("--ratio", type=float, default=3e-6, help="Smallest strength over the largest.")
        add("--folds", type=int | None, default=None, help="Choose by k-fold cross-validation.")
        add("--criterion", type=Literal["accuracy", "loss"], default="accuracy", help="Choose by this.")
        add("--tol", type=float, default=1e-3, help="Relative gap to certify.")
        add("--max_passes", type=float, default=1000.0, help="Passes over the features for one strength.")
        add("--features", type=Literal["float32", "bfloat16"], default="float32", help="Precision in the cache.")
        add("--image_batch", type=int, default=256, help="Images per call of the backbone.")
        add("--cache_dir", type=str | None, default=None, help="Where features are kept (see TORCHLIN_CACHE).")
        add("--device", type=str | None, default=None, help="Where to compute, for example cuda.")
        self.take_sizes_from_data(parser)

    def before_instantiate_classes(self) -> None:
        options = self.options()
        super().before_instantiate_classes()
        self.backbone = load_backbone(
            options.backbone, weights=options.weights, layer=options.layer, pooling=options.pooling,
            select=options.select, preprocess=options.preprocess, patches=options.patches,
            flip=options.flip,
            seed=int(options.seed_everything or 0),
        )  # fmt: skip
        preprocess = self.backbone.preprocess
        data = options.data.get("init_args", {})
        if (
            data.get("image_size", 0) is None
            and preprocess.resize is not None
            and preprocess.interpolation == "bilinear"
        ):
            # The same pixels that preprocessing would make of them, whatever their sizes; kept are features alone.
            data["image_size"], data["cache"] = preprocess.resize, False

    def probe(self, **kwargs: Any) -> None:
        options, data = self.options(), self.datamodule
        if ignored := [key for key in self.ignored() if key != "data.batch_size" or options.head == "solver"]:
            print(f"no effect on probe: {', '.join(ignored)}")
        weighted = self.model.hparams["class_weight"]
        with _Bar() as bar:
            result = LinearProbe(
                self.backbone, method=options.head,
                loss=self.model.loss if weighted is None else self.model.loss.name, class_weight=weighted,
                penalty=self.family, num=options.num, ratio=options.ratio, folds=options.folds,
                criterion=options.criterion, tol=options.tol, max_passes=options.max_passes,
                recipe=options.recipe if options.head == "sgd" else None, batch_size=options.image_batch,
                dtype=options.features, cache_dir=options.cache_dir, device=options.device, report=bar.report,
            ).fit(data)  # fmt: skip
        folder = self._folder(f"{getattr(data, 'name', 'data')}-{self.backbone.name}")
        _write(folder, result, data, self._config_text())
        _show(folder, result)

    def _folder(self, name: str) -> Path:
        options = self.options()
        return number_folder(name) if options.run is None else open_folder(options.run)

    def _config_text(self) -> str:
        full = yaml.safe_load(
            self._parser("probe").dump(self.options(), skip_none=False, skip_link_targets=True, skip_validation=True)
        )
        plain = yaml.safe_load(super()._config_text())
        plain.pop("trainer", None)
        text: str = yaml.safe_dump({**{key: full[key] for key in KEYS if key in full}, **plain}, sort_keys=False)
        return text


def _write(folder: Path, result: ProbeResult, data: Any, config: str) -> None:
    weights = own_weights(result.backbone)
    if weights is not None:
        replace_file(folder / BACKBONE_FILE, save(weights))
    replace_file(folder / CONFIG, config.encode())
    replace_file(folder / METRICS, rows_to_csv([finite(row) for row in result.choice.rows]).encode())
    facts: Mapping[str, Any] = {
        "backbone": {**result.backbone.info(), "fingerprint": result.backbone.fingerprint()},
        "chosen": result.choice.chosen, "chosen_on": result.choice.chosen_on, "trained_on": result.trained_on,
        "metrics": finite(result.metrics), "test_accuracy_of": result.per_class, "seconds": result.seconds,
    }  # fmt: skip
    # The data module itself would decode the images to count them.
    known = SimpleNamespace(
        class_names=result.class_names, input_info=data.input_info, name=data.name, fingerprint=data.fingerprint,
        sizes=result.sizes, skipped_files=getattr(data, "skipped_files", None),
    )  # fmt: skip
    write_result(folder, result, known, facts)
    from torchlin import report  # here, because matplotlib takes a while to load

    drawn = {}
    if result.confusion is not None and len(result.class_names) <= 1000:
        drawn["confusion.png"] = report.plot_confusion(result.confusion, result.class_names)
    if result.choice.path is not None:
        drawn["path.png"] = report.plot_path(result.choice.path)
    save_pictures(folder, drawn)


def _show(folder: Path, result: ProbeResult) -> None:
    metrics, choice = result.metrics, result.choice
    table = Table(title=f"{choice.chosen}; chosen on {choice.chosen_on}")
    for column in ("split", "samples", "accuracy", "what it says"):
        table.add_column(column, justify="right" if column in ("samples", "accuracy") else "left")
    everything = result.sizes["train"] + result.sizes["val"]
    table.add_row(
        "train", f"{everything:,}", f"{metrics['train_accuracy']:.4f}", "of the head written, trained on these"
    )
    table.add_row(
        "validation", f"{result.sizes['val']:,}" if result.sizes["val"] else "", f"{metrics['val_accuracy']:.4f}",
        "what was chosen by, of a head that had not seen them",
    )  # fmt: skip
    if "test_accuracy" in metrics:
        top5 = f", top-5 {metrics['test_top5_accuracy']:.4f}" if "test_top5_accuracy" in metrics else ""
        what = f"of the head written, measured once{top5}"
        table.add_row("test", f"{result.sizes['test']:,}", f"{metrics['test_accuracy']:.4f}", what)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if result.per_class:
        ordered = sorted(result.per_class.items(), key=lambda item: item[1])
        which = "by class" if len(ordered) <= _MANY else f"of the {_MANY} worst classes"
        shown = ", ".join(f"{name} {share:.3f}" for name, share in ordered[:_MANY])
        console.print(f"test accuracy {which}: {shown}", markup=False)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    found = (
        "all features from the cache" if result.computed == 0 else f"{result.computed:,} images through the backbone"
    )
    console.print(f"{found}; {seconds}", markup=False)
    console.print(f"written to {folder}{os.sep}: {', '.join(sorted(p.name for p in folder.iterdir()))}", markup=False)
    console.print(f"next: torchlin predict --run {shlex.quote(str(folder))} IMAGES...", markup=False)


class _Bar:
    """A progress bar for each part of the work, on standard error; nothing where nobody watches."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self.part: tuple[str, TaskID] | None = None

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        part = what.partition(" ")[0]
        if self.part is None or self.part[0] != part:
            if self.part is not None:
                self.progress.remove_task(self.part[1])
            self.part = part, self.progress.add_task(what, total=total)
        self.progress.update(self.part[1], description=what, completed=done, total=total)
