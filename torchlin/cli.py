"""The command line: `torchlin fit | validate | test | predict`."""

from __future__ import annotations

import argparse
import csv
import dis
import inspect
import itertools
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from torchlin import data as torchlin_data
from torchlin.classifier import DivergenceError, LinearClassifier
from torchlin.data import DataError
from torchlin.heads import LinearHead
from torchlin.predict import predict_images
from torchlin.registry import nearest
from torchlin.run import CHECKPOINT, CONFIG, RunFolder, add_metrics, check_checkpoint, find_run, newest_run
from torchlin.storage import load_head
from torchlin.version import __version__

HELP = """\
usage: torchlin COMMAND [OPTIONS]

Train and use linear classifiers.

  torchlin fit                                  train on the digits that come with scikit-learn
  torchlin fit --config cifar10-softmax --data.root PHOTOS
                                                train on a folder with one folder of images per class
  torchlin fit --resume RUN                     go on where an interrupted run stopped
  torchlin validate | test [--run RUN]          measure a run (default: the newest under runs/)
  torchlin predict [--run RUN] IMAGES...        label image files, or all images of a folder, into a CSV
  torchlin COMMAND --help                       all options of a command

Configurations by name (--config NAME): {configs}
A run is a folder: head.safetensors, head.json, config.yaml, metrics.csv, checkpoint.ckpt and pictures.
"""
COMMANDS = ("fit", "validate", "test", "predict")
_SAVED_KEYS = ("seed_everything", "trainer", "model", "data")


def config_folder() -> Path:
    """Where the named configurations are: in the installed package, or at the top of a source checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def config_names() -> list[str]:
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name: str) -> str:
    """A path as it is, or the path of the configuration called `name`.

    Raises:
        ValueError: neither.
    """
    if os.path.exists(name):
        return name
    if name in config_names():
        return str(config_folder() / f"{name}.yaml")
    raise ValueError(
        f"--config {name}: no such file, and no configuration of that name{nearest(name, config_names())}; "
        f"known: {', '.join(config_names())}"
    )


class TorchlinCLI(LightningCLI):
    """LightningCLI with a run folder: num_classes and in_features come from the data, the default data are digits."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            LinearClassifier,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,  # the run folder keeps config.yaml
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "logger": False, "enable_model_summary": False},
            auto_configure_optimizers=False,
            args=arguments,
            parser_kwargs={
                **_STRICT,
                **{
                    name: {"description": text, "usage": f"torchlin {name} [OPTIONS]", **_STRICT}
                    for name, text in _DESCRIPTIONS.items()
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
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_features", "model.in_features", apply_on="instantiate")
        parser.set_defaults({"data": {"class_path": "torchlin.data.DigitsDataModule"}})

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters of a checkpoint override the command line.
        return

    def options(self) -> Namespace:
        options: Namespace = self.config[self.subcommand]
        return options

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.options()
        given = self._get(self.config_init, "trainer")
        callbacks = given["callbacks"] or []
        kwargs["callbacks"] = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if given["enable_progress_bar"] is not False and not any(
            isinstance(c, ProgressBar) for c in kwargs["callbacks"]
        ):
            kwargs["callbacks"].append(_ShortBar())
        if self.subcommand == "fit":
            self.run_folder = RunFolder(
                options.resume or options.run, resume=options.resume is not None, config=self._config_text()
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
        if resume is not None:
            checkpoint = find_run(resume) / CHECKPOINT
            check_checkpoint(checkpoint, self.model)
        self.trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint, weights_only=True)

    def after_fit(self) -> None:
        folder = self.run_folder.path
        if folder is None or not (folder / "head.json").is_file():
            return  # a dry run (fast_dev_run) writes nothing
        if _size(self.datamodule, "test"):
            self.trainer.test(self.model, self.datamodule, verbose=False)
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
        same = getattr(self.datamodule, "fingerprint", None) == head.info.get("data", {}).get("fingerprint")
        if split == "test" and same:  # which samples are validation samples depends on options too
            add_metrics(folder, dict(metrics))
        table = Table(title=f"{folder}, {split} split")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        Console().print(table)


class _ShortBar(RichProgressBar):
    """Lightning's progress bar without the speed, so that a line and its metric fit into 80 columns."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]


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


def show_run(folder: Path, data: LightningDataModule) -> None:
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
    console.print(f"train: mean over the last epoch; nonzero weights: {metrics.get('nonzero', 1):.1%}")
    files = sorted(path.name for path in folder.iterdir())
    console.print(f"written to {folder}{os.sep}: {', '.join(files)}", markup=False)
    images = info["input"]["kind"] == "pixels"
    run = shlex.quote(str(folder))
    measured = "test" if _size(data, "test") else "validate"
    following = f"torchlin predict --run {run} IMAGES..." if images else f"torchlin {measured} --run {run}"
    console.print(f"next: {following}", markup=False)


class _Parser(argparse.ArgumentParser):
    """One whose errors `main` prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def predict(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="torchlin predict",
        allow_abbrev=False,
        description="Label images with a trained head. Prints (or writes) a CSV: file,label,score,probability, one row "
        "per image in the order given; probability is empty for losses that define none (hinge, perceptron).",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, or folders of images")
    parser.add_argument("--run", help="run folder (default: the newest under runs/)")
    parser.add_argument("--output", metavar="FILE", help="CSV to write (default: standard output)")
    parser.add_argument("--scores", action="store_true", help="add one column per class with its score")
    parser.add_argument("--batch_size", type=int, default=1024, help="images per batch (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder = newest_run() if options.run is None else find_run(options.run)
    head = load_head(folder)
    rows = predict_images(head, options.images, batch_size=options.batch_size, all_scores=options.scores)
    header = ["file", "label", "score", "probability", *(head.info["class_names"] if options.scores else [])]
    with _output(options.output) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    if options.output:
        print(f"{len(rows)} images labelled by {folder}: {options.output}", file=sys.stderr)


@contextmanager
def _output(path: str | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
        return
    final = Path(path)
    beside = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        with beside.open("w", newline="", encoding="utf-8") as stream:
            yield stream
        beside.replace(final)
    except OSError as error:
        raise ValueError(f"--output {final}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)


def _lightning(arguments: list[str]) -> None:
    command, *rest = arguments
    rest = _named_configs(rest)
    run = None
    if not {"-h", "--help"} & set(rest):
        if command in ("validate", "test"):
            named = _values(rest, "--run")
            run = find_run(named[-1]) if named else newest_run()
            rest = [*rest, "--run", str(run)]
        elif resumed := _values(rest, "--resume"):
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
    TorchlinCLI([command, *rest])


def _names_data(config: str) -> bool:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{config}: no configuration, it cannot be read as YAML ({' '.join(str(error).split())})"
        ) from None
    return isinstance(content, dict) and "data" in content


_DATA_CLASSES = [name for name in torchlin_data.__all__ if name.endswith("DataModule") and name != "ArrayDataModule"]
_METAVARS = {"root": "FOLDER", "path": "FILE"}
_DATA_BY_OPTION = {"--data.root": "ImageFolderDataModule", "--data.path": "FeaturesDataModule"}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for an expected error (one line on standard error), 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(configs=", ".join(config_names())))
        return 0
    if arguments[0] in ("--version", "-V"):
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        return _fail(f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; known: {', '.join(COMMANDS)}")
    _quiet()
    command: Callable[[], None] = (
        (lambda: predict(arguments[1:])) if arguments[0] == "predict" else (lambda: _lightning(arguments))
    )
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # So Lightning ends a run that Ctrl-C stopped, when its callbacks have written everything.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        return int(stop.code or 0) if isinstance(stop.code, int) or stop.code is None else _fail(str(stop.code))
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            raise
        return _fail(_message(expected, arguments))
    return 0


def _expected(error: BaseException | None) -> BaseException | None:
    """The error that is the user's to mend, if any: torchlin raised it, or it is about files or options.

    jsonargparse wraps what a constructor raises in errors of its own, which are followed to what they wrap.
    """
    wrapper = None
    while error is not None:
        if isinstance(error, (DataError, DivergenceError, MisconfigurationException, OSError)):
            return error
        path, raised = _origin(error)
        if isinstance(error, (ValueError, TypeError)) and raised and path.is_relative_to(Path(__file__).parent):
            return error
        if isinstance(error, (ArgumentError, argparse.ArgumentError)):
            wrapper = wrapper or error
        elif "jsonargparse" not in path.parts:
            break
        error = error.__cause__ or error.__context__
    return wrapper


def _origin(error: BaseException) -> tuple[Path, bool]:
    """The file that an error comes from, and whether by a `raise` there: a bug would come from anything else."""
    last = error.__traceback__
    if last is None:
        return Path(), False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return Path(code.co_filename), code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _message(error: BaseException, arguments: Sequence[str]) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, DataError):
        return str(error)  # a list of files may take several lines
    if not isinstance(error, (ArgumentError, argparse.ArgumentError)):
        return " ".join(str(error).split())
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", str(error))
    if unknown:
        known = [f"--{key}" for key in _known_options(arguments[0])]
        return (
            f"{arguments[0]} has no option {unknown[1]}{nearest(unknown[1], known)}; see torchlin {arguments[0]} --help"
        )
    return _option_message(str(error))


def _option_message(text: str) -> str:
    """jsonargparse's report of a value that does not fit, in one line: which option, what it takes, what it was."""
    keys = re.findall(r'Parser key "([\w.]+)"', text)
    if not keys:
        return " ".join(text.split())
    text = text.replace("dot import path string", "class")
    outer, inner = keys[0], keys[-1]  # a report on an argument of a class is nested in that on the class
    cls = re.search(r"given class_path '[\w.]*?(\w+)'", text)
    if cls and (missing := re.search(r"arguments are required: (.+)", text)):
        return f"{cls[1]} needs {' and '.join(_example(outer, name) for name in missing[1].split(', '))}"
    if cls and (refused := re.search(r"Option '(\w+)' is not accepted", text)):
        return f"{cls[1]} has no option --{outer}.{refused[1]}"
    lines = [line.strip().removeprefix("- ") for line in text[text.rindex("Parser key") :].splitlines()]
    expected = [
        re.match(r"Expected an? (?!path but|<class 'NoneType'>)(.*?)(: .*|\. Got value: .*)?$", x) for x in lines
    ]
    kinds = [re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*)\]", r"\1\2", match[1]) for match in expected if match]
    given = re.search(r"(?:Given|Got) value: (.*)", "\n".join(lines))
    option = inner if inner.startswith(outer) else f"{outer}.{inner}"
    message = (
        f"--{option}: {'expected ' + ' or '.join(kinds) if kinds else lines[-1]}{', got ' + given[1] if given else ''}"
    )
    if option != "data" or not given:
        return message
    return f"{message}{nearest(given[1], _DATA_CLASSES)}; data: {', '.join(_DATA_CLASSES)}"


def _example(key: str, name: str) -> str:
    return f"--{key}.{name} {_METAVARS.get(name, name.upper())}"


def _known_options(command: str) -> list[str]:
    if command == "predict":
        return ["run", "output", "scores", "batch_size"]
    model = [f"model.{name}" for name in inspect.signature(LinearClassifier).parameters]
    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    data = ["data", "data.root", "data.path", "data.batch_size", "data.num_workers", "data.seed", "data.val_fraction"]
    return [*model, *trainer, *data, "run", "resume", "config", "seed_everything"]


def _fail(message: str) -> int:
    print(f"torchlin: error: {message}", file=sys.stderr)
    return 2


_NOISE = (
    "GPU available|TPU available|HPU available|💡|litlogger|`Trainer.fit` stopped|"
    "Loading `train_dataloader` to estimate|Seed set to"
)


def _quiet() -> None:
    """Keep off the screen what says nothing to a person who typed a command: notes about Lightning's own code."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not re.search(_NOISE, record.getMessage()))
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero.*")  # no such split
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"torchlin: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
