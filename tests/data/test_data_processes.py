"""Decoding in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchlin.data import DataError, decoding
from torchlin.data.decoding import decode_files, decode_good
from torchlin.data.images import PixelFormat

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
FORMAT = PixelFormat((3, 8, 8), "rgb")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(1500):
        made.append(tmp_path / f"{i:04d}.png")
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(made[-1])
    return made


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make decoding fork; the list says with how many processes."""
    counts: list[int] = []
    fork = decoding._forked
    monkeypatch.setattr(decoding, "_TEAM_SHARE", 0.0)
    monkeypatch.setattr(decoding, "_WORTH_FORKING", 0.0)
    monkeypatch.setattr(decoding, "available_cores", lambda: 2)
    monkeypatch.setattr(decoding, "_forked", lambda count: counts.append(count) or fork(count))
    return counts


def test_same_pixels_in_the_same_order(paths: list[Path], forked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    images = decode_files(paths, FORMAT)
    assert forked == [2]
    assert multiprocessing.active_children() == []
    monkeypatch.setattr(decoding, "can_fork", lambda: False)
    assert torch.equal(decode_files(paths, FORMAT), images)
    assert forked == [2]


def test_bad_files_are_found_where_they_are(paths: list[Path], forked: list[int]) -> None:
    whole = decode_files(paths, FORMAT)
    for place in (3, 700, 1499):
        paths[place].write_bytes(b"no image")
    images, bad = decode_good(paths, FORMAT)
    assert [file.place for file in bad] == [3, 700, 1499]
    assert all(str(paths[file.place]) in file.reason for file in bad)
    kept = [i for i in range(1500) if i not in (3, 700, 1499)]
    assert torch.equal(images, whole[kept])


def test_another_size_stops_it(paths: list[Path], forked: list[int]) -> None:
    Image.new("RGB", (9, 8)).save(paths[1200])
    with pytest.raises(DataError, match=r"1200\.png: image is 9×8 pixels"):
        decode_files(paths, FORMAT)
    assert forked == [2]
    assert multiprocessing.active_children() == []


_ENDLESS = """
import sys
from torchlin.data import decoding
from torchlin.data.images import PixelFormat
decoding._TEAM_SHARE = decoding._WORTH_FORKING = 0.0
decoding.available_cores = lambda: 2
for chunk in decoding.decode_chunks([sys.argv[1]] * 10**7, PixelFormat((3, 8, 8), "rgb")):
    print(".", flush=True)
"""


@pytest.mark.slow
def test_they_die_with_their_parent(paths: list[Path]) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(paths[0])], stdout=subprocess.PIPE, env={**os.environ}
    )
    try:
        assert parent.stdout is not None
        children: list[int] = []
        deadline = time.monotonic() + 120
        while len(children) < 2 and time.monotonic() < deadline:
            parent.stdout.readline()
            listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            children = [int(pid) for pid in listed]
        assert len(children) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
