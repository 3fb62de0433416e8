"""What a person at the terminal is told: errors in one line, and no notes that are not for them."""

from __future__ import annotations

import argparse
import dis
import inspect
import logging
import re
import warnings
from pathlib import Path

from torchlin import data
from torchlin.data import DataError
from torchlin.registry import nearest

_PACKAGE = Path(__file__).parents[1]

DATA_CLASSES = [name for name in data.__all__ if name.endswith("DataModule") and name != "ArrayDataModule"]

# The commands that load Lightning, which takes seconds: what is imported inside a function here is for these alone.
_TRAINING = ("fit", "solve", "probe", "validate", "test")
_METAVARS = {"root": "FOLDER", "path": "FILE"}


def expected_error(error: BaseException | None, command: str) -> BaseException | None:
    """The error of `torchlin <command>` that is the user's to mend, if any.

    torchlin raised it, or it is about files or options. jsonargparse wraps what a constructor raises in errors of its
    own, which are followed to what they wrap.
    """
    expected: tuple[type[Exception], ...] = (DataError, OSError)
    if command in _TRAINING:
        expected += _training_errors()
    wrapper = None
    while error is not None:
        if isinstance(error, expected):
            return error
        path, raised = _origin(error)
        if isinstance(error, (ValueError, TypeError)) and raised and path.is_relative_to(_PACKAGE):
            return error
        if isinstance(error, argparse.ArgumentError):  # jsonargparse's is the same class
            wrapper = wrapper or error
        elif "jsonargparse" not in path.parts:
            break
        error = error.__cause__ or error.__context__
    return wrapper


def _training_errors() -> tuple[type[Exception], ...]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from torchlin.classifier import DivergenceError

    return DivergenceError, MisconfigurationException


def _origin(error: BaseException) -> tuple[Path, bool]:
    """The file that an error comes from, and whether by a `raise` there: a bug would come from anything else."""
    last = error.__traceback__
    if last is None:
        return Path(), False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return Path(code.co_filename), code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def one_line(error: BaseException, command: str) -> str:
    """What to print for an expected error of `torchlin <command>`."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, DataError):
        return str(error)  # a list of files may take several lines
    if not isinstance(error, argparse.ArgumentError):
        return " ".join(str(error).split())
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", str(error))
    if unknown:
        known = [f"--{key}" for key in _known_options(command)]
        return f"{command} has no option {unknown[1]}{nearest(unknown[1], known)}; see torchlin {command} --help"
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
    return f"{message}{nearest(given[1], DATA_CLASSES)}; data: {', '.join(DATA_CLASSES)}"


def _example(key: str, name: str) -> str:
    return f"--{key}.{name} {_METAVARS.get(name, name.upper())}"


def _known_options(command: str) -> list[str]:
    if command not in _TRAINING:
        return ["run", "output", "scores", "batch_size", "max_pixels", "on_error", "help"]
    from lightning.pytorch import Trainer

    from torchlin.classifier import LinearClassifier

    model = [f"model.{name}" for name in inspect.signature(LinearClassifier).parameters]
    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    data = ["data", "data.root", "data.path", "data.batch_size", "data.num_workers", "data.seed", "data.val_fraction"]
    solver = ["path", "num", "ratio", "folds", "criterion", "tol", "max_passes", "device"]
    if command == "solve":
        return [*solver, *model, *trainer, *data, "run", "config", "seed_everything"]
    if command == "probe":
        from torchlin.cli.probe import KEYS

        return [*KEYS, "cache_dir", *model, *data, "run", "config", "seed_everything"]
    return [*model, *trainer, *data, "run", "resume", "save_every", "config", "seed_everything"]


_NOISE = (
    "GPU available|TPU available|HPU available|💡|litlogger|`Trainer.fit` stopped|"
    "Loading `train_dataloader` to estimate|Seed set to"
)


def quiet(command: str) -> None:
    """Keep off the screen what says nothing to a person who typed a command: notes about Lightning's own code."""
    warnings.formatwarning = _format_warning
    if command not in _TRAINING:
        return
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not re.search(_NOISE, record.getMessage()))
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero.*")  # no such split


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if Path(filename).is_relative_to(_PACKAGE):
        return f"torchlin: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
