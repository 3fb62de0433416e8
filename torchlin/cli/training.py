"""`torchlin fit | validate | test`."""

from __future__ import annotations

import importlib
import itertools
import os
import shlex
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from torchlin.classifier import LinearClassifier
from torchlin.cli.certificates import certificate_line
from torchlin.cli.configs import find_config
from torchlin.data import DataError
from torchlin.folder import CHECKPOINT, CONFIG, add_metrics, begun, check_free, find_run, newest_run
from torchlin.heads import LinearHead
from torchlin.progress import ProgressBar
from torchlin.run import RunFolder, check_checkpoint
from torchlin.storage import load_head

_SAVED_KEYS = ("seed_everything", "trainer", "model", "data")


_DATA_BY_OPTION = {"--data.root": "ImageFolderDataModule", "--data.path": "FeaturesDataModule"}


def train_or_measure(command: str, rest: list[str]) -> None:
    """`torchlin fit | validate | test` with the arguments `rest`."""
    TorchlinCLI([command, *completed(command, rest)])


def completed(command: str, rest: list[str]) -> list[str]:
    """The arguments of a command with the run, the data and the files that they leave out or name."""
    rest = _named_configs(rest)
    run = None
    if not {"-h", "--help"} & set(rest):
        if command in ("validate", "test"):
            named = _values(rest, "--run")
            run = find_run(named[-1]) if named else newest_run()
            rest = [*rest, "--run", str(run)]
            if _is_probe(run):
                raise ValueError(
                    f"{run}: is a probe, measured once on the test images when it was made (metrics in head.json); "
                    "torchlin predict labels other images with it"
                )
        elif command == "fit" and (resumed := _values(rest, "--resume")):
            run = find_run(resumed[-1])
    if run is not None:
        if not (run / CONFIG).is_file():
            raise FileNotFoundError(f"{run}: holds no {CONFIG}, so it is not a run")
        # The run's own configuration first: what is on the command line overrides it.
        rest = ["--config", str(run / CONFIG), *rest]
    if not _values(rest, "--data") and not any(_names_data(path) for path in _values(rest, "--config", "-c")):
        # The data named by what only one class takes; otherwise the digits.
        guess = next((cls for option, cls in _DATA_BY_OPTION.items() if _values(rest, option)), None)
        if run is not None and guess is None:
            raise ValueError(f"{run}: its {CONFIG} names no data, as a script made it: name them with --data")
        rest = [*(["--data", guess] if guess else []), *rest]
    return rest


def _is_probe(run: Path) -> bool:
    return (run / "head.json").is_file() and "backbone" in load_head(run).info


def _names_data(config: str) -> bool:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{config}: no configuration, it cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None
    return isinstance(content, dict) and "data" in content


def _named_configs(arguments: list[str]) -> list[str]:
    out = list(arguments)
    for i, word in enumerate(out):
        if word in ("--config", "-c") and i + 1 < len(out):
            out[i + 1] = find_config(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + find_config(word.removeprefix("--config="))
    return out


def _values(arguments: list[str], *options: str) -> list[str]:
    """What `options` are given, in order, as `--option value` and `--option=value`."""
    values = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        name, is_joined, joined = word.partition("=")
        if name in options and (is_joined or following is not None):
            values.append(joined if is_joined else following)
    return values


class TorchlinCLI(LightningCLI):
    """LightningCLI with a run folder: num_classes and in_features come from the data, the default data are digits."""

    def __init__(self, arguments: list[str], trainer_class: type[Trainer] = Trainer) -> None:
        super().__init__(
            LinearClassifier,
            LightningDataModule,
            trainer_class=trainer_class,
            subclass_mode_data=True,
            save_config_callback=None,  # the run folder keeps config.yaml
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "logger": False, "enable_model_summary": False},
            auto_configure_optimizers=False,
            args=arguments,
            parser_kwargs={
                **_STRICT,
                **{
                    name: {"description": _DESCRIPTIONS[name], "usage": f"torchlin {name} [OPTIONS]", **_STRICT}
                    for name in self.subcommands()
                },
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] | {"ckpt_path", "weights_only"} for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, default=None, help=_RUN_HELP)
        parser.add_argument("--resume", type=str | None, default=None, help="Run folder to continue in (fit only).")
        parser.add_argument(
            "--save_every", type=float, default=60.0, help="Seconds between checkpoints inside an epoch (fit only)."
        )
        self.take_sizes_from_data(parser)

    @staticmethod
    def take_sizes_from_data(parser: LightningArgumentParser) -> None:
        """The classifier's sizes are those of the data, which are digits unless said otherwise."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_features", "model.in_features", apply_on="instantiate")
        parser.set_defaults({"data": {"class_path": "torchlin.data.DigitsDataModule"}})

    def before_instantiate_classes(self) -> None:
        # A loss or penalty of the user's own, by import path. It stands on the command line, so it may be imported.
        model = self.options().model
        for spec in (model.loss, model.penalty):
            name = spec.get("name", "") if isinstance(spec, dict) else str(spec or "")
            module, _, _ = name.rpartition(".")
            if module:
                _import(module, name)

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters of a checkpoint override the command line.
        return

    def options(self) -> Namespace:
        options: Namespace = self.config[self.subcommand]
        return options

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.options()
        given = self._get(self.config_init, "trainer")
        if given["enable_checkpointing"] is False:
            raise ValueError("--trainer.enable_checkpointing false: a run folder keeps a checkpoint to resume from")
        callbacks = given["callbacks"] or []
        kwargs["callbacks"] = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if given["enable_progress_bar"] is not False and not any(
            isinstance(c, LightningBar) for c in kwargs["callbacks"]
        ):
            kwargs["callbacks"].append(ProgressBar())
        if self.subcommand == "fit":
            if options.run is not None and options.resume is None:
                check_free(options.run)  # before the data are read, which may take long
            self.run_folder = RunFolder(
                options.resume or options.run,
                resume=options.resume is not None,
                config=self._config_text(),
                save_every=options.save_every,
            )
            kwargs["callbacks"].append(self.run_folder)
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--trainer: {error}") from error

    def _config_text(self) -> str:
        full = yaml.safe_load(
            self._parser(self.subcommand).dump(self.options(), skip_none=False, skip_link_targets=True)
        )
        text: str = yaml.safe_dump({key: full[key] for key in _SAVED_KEYS if key in full}, sort_keys=False)
        return text

    def fit(self, **kwargs: Any) -> None:
        resume = self.options().resume
        checkpoint = None
        if resume is not None and begun(find_run(resume)):  # otherwise it starts from the beginning
            checkpoint = find_run(resume) / CHECKPOINT
            check_checkpoint(checkpoint, self.model)
        self.trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint, weights_only=True)

    def after_fit(self) -> None:
        folder = self.run_folder.path
        if folder is None or not (folder / "head.json").is_file():
            return  # a dry run (fast_dev_run) writes nothing
        if _size(self.datamodule, "test"):
            self.trainer.test(self.model, self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            show_run(folder, self.datamodule)

    def validate(self, **kwargs: Any) -> None:
        self._measure("val")

    def test(self, **kwargs: Any) -> None:
        self._measure("test")

    def _measure(self, split: str) -> None:
        folder = find_run(self.options().run)
        head = load_head(folder)
        check_head(head, folder, self.datamodule)
        if not _size(self.datamodule, split):
            raise DataError(f"the data of {folder} have no {'validation' if split == 'val' else 'test'} split")
        self.model.set_head(head)
        measure = self.trainer.validate if split == "val" else self.trainer.test
        (metrics,) = measure(self.model, self.datamodule, verbose=False)
        if not self.trainer.is_global_zero:
            return
        same = getattr(self.datamodule, "fingerprint", None) == head.info.get("data", {}).get("fingerprint")
        if split == "test" and same:  # which samples are validation samples depends on options too
            add_metrics(folder, dict(metrics))
        table = Table(title=f"{folder}, {split} split")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
        if split == "test" and same and (line := certificate_line(folder, head, self.datamodule)):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _import(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {module} cannot be imported ({error})") from None


# Errors are raised for `main` to print in one line, and an option is never guessed from its beginning.
_STRICT = {"prog": "torchlin", "exit_on_error": False, "allow_abbrev": False}
_RUN_HELP = (
    "Run folder. fit: where to write (default: runs/<data>-<loss>-<number>); validate and test: what to measure "
    "(default: the newest run)."
)
_DESCRIPTIONS = {
    "fit": "Train a linear classifier. Without options: softmax on scikit-learn's digits. The ones most used: "
    "--data.root FOLDER, --model.loss hinge, --model.penalty '{name: l1, strength: 0.001}', "
    "--trainer.max_epochs 20, --run FOLDER.",
    "validate": "Measure a run on its validation split.",
    "test": "Measure a run on its test split.",
    "probe": "Train a linear head on the features of a frozen backbone, its penalty chosen without the test images. "
    "The options most used: --backbone resnet18 --weights DEFAULT, --layer avgpool, --data.root FOLDER, --run FOLDER.",
    "solve": "Minimise fit's objective to a certified optimum, without a learning rate. The options most used: "
    "--data.root FOLDER, --model.loss hinge, --model.penalty '{name: l2, strength: 0.001}', --path (choose the "
    "strength on the validation split), --tol 1e-6, --run FOLDER.",
}


def check_head(head: LinearHead, folder: Path, data: LightningDataModule) -> None:
    """That a run and the data speak of the same classes and features."""
    names, here = head.info["class_names"], list(getattr(data, "class_names", head.info["class_names"]))
    if names != here:
        raise ValueError(
            f"{folder}: trained on {len(names)} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''}), "
            f"but the data have {len(here)} ({', '.join(here[:5])}{', …' if len(here) > 5 else ''})"
        )
    in_features = getattr(data, "in_features", head.in_features)
    if in_features != head.in_features:
        raise ValueError(f"{folder}: trained on {head.in_features} features, but the data have {in_features}")


def _size(data: LightningDataModule, split: str) -> int:
    sizes = getattr(data, "sizes", None)
    return 1 if sizes is None else int(sizes[split])


def show_run(folder: Path, data: LightningDataModule, train_note: str = "mean over the last epoch") -> None:
    """Print what a run reached, where it is, and what to do next."""
    info = load_head(folder).info
    metrics = info["metrics"]
    table = Table(title="choose by validation; the test row is for the final choice")
    for column in ("split", "samples", "loss", "accuracy"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, label in (("train", "train"), ("val", "validation"), ("test", "test")):
        size = str(_size(data, split)) if hasattr(data, "sizes") else ""
        if f"{split}_accuracy" in metrics:
            table.add_row(label, size, f"{metrics[f'{split}_loss']:.4f}", f"{metrics[f'{split}_accuracy']:.4f}")
        else:
            table.add_row(label, size, "none", "none")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"train: {train_note}; nonzero weights: {metrics.get('nonzero', 1):.1%}")
    files = sorted(path.name for path in folder.iterdir())
    console.print(f"written to {folder}{os.sep}: {', '.join(files)}", markup=False)
    images = info["input"]["kind"] == "pixels"
    run = shlex.quote(str(folder))
    measured = "test" if _size(data, "test") else "validate"
    following = f"torchlin predict --run {run} IMAGES..." if images else f"torchlin {measured} --run {run}"
    console.print(f"next: {following}", markup=False)
