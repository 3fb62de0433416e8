"""Generated image folders, and a cache folder of its own for every test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Grow = Callable[[Mapping[str, int]], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty and outside `tmp_path`; no test may touch the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TORCHLIN_CACHE", str(folder))
    return folder


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """Write a folder `photos` of 4×3 PNG images: {"train/cat": 5} puts five into photos/train/cat."""

    def write(counts: Mapping[str, int]) -> Path:
        root = tmp_path / "photos"
        rng = np.random.default_rng(0)
        for name, count in counts.items():
            folder = root / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (4, 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return root

    return write
