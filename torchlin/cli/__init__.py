"""The command line: `torchlin fit | solve | probe | validate | test | predict`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial

from torchlin.cli import messages
from torchlin.cli.configs import config_names
from torchlin.registry import nearest
from torchlin.version import __version__

HELP = """\
usage: torchlin COMMAND [OPTIONS]

Train and use linear classifiers.

  torchlin fit                                  train on the digits that come with scikit-learn
  torchlin fit --config cifar10-softmax --data.root PHOTOS
                                                train on a folder with one folder of images per class
  torchlin fit --resume RUN                     go on where an interrupted run stopped
  torchlin solve [--path]                       minimise the same objective to a certified optimum; choose its penalty
  torchlin probe --backbone resnet18 --weights DEFAULT --data.root PHOTOS
                                                train a head on the features of a frozen network
  torchlin validate | test [--run RUN]          measure a run (default: the newest under runs/)
  torchlin predict [--run RUN] IMAGES...        label image files, or all images of a folder, into a CSV
  torchlin COMMAND --help                       all options of a command

Configurations by name (--config NAME): {configs}
A run is a folder: head.safetensors, head.json, config.yaml, metrics.csv, checkpoint.ckpt and pictures.
"""
COMMANDS = ("fit", "solve", "probe", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for an expected error (one line on standard error), 130 for Ctrl-C."""
    own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(configs=", ".join(config_names())))
        return 0
    if arguments[0] in ("--version", "-V"):
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        return _fail(f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; known: {', '.join(COMMANDS)}")
    command, *rest = arguments
    messages.quiet(command)
    run = _loaded(command)
    if own_process:
        gc.freeze()  # modules are no garbage: without a last look through them all, the process ends 0.2 s sooner
    try:
        run(rest)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # So Lightning ends a run that Ctrl-C stopped, when its callbacks have written everything.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        return int(stop.code or 0) if isinstance(stop.code, int) or stop.code is None else _fail(str(stop.code))
    except Exception as error:
        expected = messages.expected_error(error, command)
        if expected is None:
            raise
        return _fail(messages.one_line(expected, command))
    return 0


def _loaded(command: str) -> Callable[[list[str]], None]:
    """What runs a command. Lightning takes seconds to load: --help, a mistyped command and predict do without it."""
    if command == "predict":
        from torchlin.cli.predict import predict

        return predict
    from torchlin import data
    from torchlin.cli.training import train_or_measure

    for name in messages.DATA_CLASSES:
        getattr(data, name)  # once loaded, jsonargparse knows it by its name alone
    if command == "solve":
        from torchlin.cli.solve import solve_run

        return solve_run
    if command == "probe":
        from torchlin.cli.probe import probe_run

        return probe_run
    return partial(train_or_measure, command)


def _fail(message: str) -> int:
    print(f"torchlin: error: {message}", file=sys.stderr)
    return 2
