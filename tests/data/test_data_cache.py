"""Listing and clearing the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from torchlin.data import ImageFolderDataModule
from torchlin.data.cache import list_stores, main
from torchlin.data.store import locked

Grow = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def root(grow: Grow) -> Path:
    """A folder of which the cache holds three stores: train and test as they are, and train in grey."""
    root = grow({"train/cat": 2, "train/dog": 3, "test/dog": 1})
    module = ImageFolderDataModule(str(root))
    module.setup("fit")
    gray = ImageFolderDataModule(str(root), color="gray")
    gray.train_dataloader()
    return root


def names(cache: Path) -> list[str]:
    return [info.folder.name for info in list_stores(cache)]


def test_listing(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "no store").mkdir()
    infos = list_stores(cache)
    assert sorted((info.source, info.images) for info in infos) == [
        (str(root / "test"), 1),
        (str(root / "train"), 5),
        (str(root / "train"), 5),
    ]
    for command in ([], ["list"]):
        assert main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{cache}/: 3 stores, 0.0 MB")
        assert all(info.folder.name in "\n".join(lines) for info in infos)
        assert time.strftime("%Y-%m-%d") in lines[1]


def test_an_empty_or_missing_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache-dir", str(tmp_path / "none")]) == 0
    assert "0 stores" in capsys.readouterr().out
    assert main(["--cache-dir", str(tmp_path / "none"), "clear"]) == 0
    assert not (tmp_path / "none").exists()


def test_clearing_one_and_all(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, gone, _ = names(cache)
    (cache / "no store").mkdir()
    assert main(["clear", gone]) == 0
    assert "removed 1 of 3 stores" in capsys.readouterr().out
    assert kept in names(cache)
    assert gone not in names(cache)
    assert main(["clear", kept + "x"]) == 2
    assert f"no store '{kept}x' (did you mean '{kept}'?)" in capsys.readouterr().err
    assert main(["clear"]) == 0
    assert names(cache) == []
    assert (cache / "no store").is_dir(), "what is no store is not ours to remove"
    module = ImageFolderDataModule(str(root))
    assert module.sizes["train"] == 4


def test_clearing_what_was_not_used_for_long(root: Path, cache: Path) -> None:
    old = names(cache)[0]
    os.utime(cache / old, (0, time.time() - 10 * 86_400))
    assert main(["clear", "--older-than", "11"]) == 0
    assert len(names(cache)) == 3
    assert main(["clear", "--older-than", "9"]) == 0
    assert len(names(cache)) == 2
    assert old not in names(cache)


def test_using_a_store_is_noted(root: Path, cache: Path) -> None:
    for name in names(cache):
        os.utime(cache / name, (0, 0))
    ImageFolderDataModule(str(root)).setup("test")
    assert [info.last_used > 0 for info in list_stores(cache)] == [True, False, False]


def test_a_store_that_is_being_built_is_left(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy = names(cache)[0]
    with locked(cache / busy):
        assert main(["clear"]) == 2
    assert names(cache) == [busy]
    assert "left, a process is working on it" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed(root: Path, cache: Path) -> None:
    (cache / f"{names(cache)[0]}.building-123").mkdir()
    assert len(list_stores(cache)) == 4
    assert main(["clear"]) == 0
    assert [path.name for path in cache.iterdir()] == [".locks"]


def test_a_running_module_does_not_notice(root: Path) -> None:
    module = ImageFolderDataModule(str(root))
    module.setup("fit")
    before = module._arrays["train"].inputs.clone()
    assert main(["clear"]) == 0
    assert (module._arrays["train"].inputs == before).all()


@pytest.mark.slow
def test_as_a_command(root: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "torchlin.data.cache", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "3 stores" in done.stdout
    assert done.stderr == ""
