"""Configurations by name."""

from __future__ import annotations

import os
from pathlib import Path

from torchlin.registry import nearest

_PACKAGE = Path(__file__).parents[1]


def config_folder() -> Path:
    """Where the named configurations are: in the installed package, or at the top of a source checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


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
