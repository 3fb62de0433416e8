"""The command line: `torchlin fit | validate | test | predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
  torchlin validate | test [--run RUN]          measure a run (default: the newest under runs/)
  torchlin predict [--run RUN] IMAGES...        label image files, or all images of a folder, into a CSV
  torchlin COMMAND --help                       all options of a command

Configurations by name (--config NAME): {configs}
A run is a folder: head.safetensors, head.json, config.yaml, metrics.csv, checkpoint.ckpt and pictures.
"""
COMMANDS = ("fit", "validate", "test", "predict")


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
    command, *rest = arguments
    # Here, because Lightning takes seconds to load: --help and a mistyped command need not wait for it.
    from torchlin.cli import messages, predict, training

    messages.quiet()
    try:
        if command == "predict":
            predict.predict(rest)
        else:
            training.train_or_measure(command, rest)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # So Lightning ends a run that Ctrl-C stopped, when its callbacks have written everything.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        return int(stop.code or 0) if isinstance(stop.code, int) or stop.code is None else _fail(str(stop.code))
    except Exception as error:
        expected = messages.expected_error(error)
        if expected is None:
            raise
        return _fail(messages.one_line(expected, command))
    return 0


def _fail(message: str) -> int:
    print(f"torchlin: error: {message}", file=sys.stderr)
    return 2
