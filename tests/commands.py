"""Running the command line inside a test."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def refused(result: Result, message: str = "") -> None:
    """One line of error, exit code 2, and no run."""
    assert result.code == 2
    assert result.err.startswith("torchlin: error: ")
    assert result.err.count("\n") == 1, result.err
    assert re.search(message, result.err), result.err
    assert not list(Path().glob("runs/*/*.json"))
