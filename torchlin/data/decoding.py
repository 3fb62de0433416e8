"""Decoding many image files, in parallel and in order, with all bad files reported at once."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat, Pixels, decode_image

# Images handed to a thread at a time: enough to make handing over cheap, and no more than 4 MB of pixels.
_CHUNK = 64
_CHUNK_BYTES = 2**22
# Chunks for each thread by which is found how many threads are fastest.
_TRIED = 3
# Threads together must take less than this share of the time of one, or one is taken: the share varies.
_TEAM_SHARE = 0.75
# Seconds of work from which on processes are started: they take a tenth of a second to start and to end.
_WORTH_FORKING = 0.5
_PROGRESS_FROM = 2000
_LISTED = 20


OtherSizes = Literal["raise", "bad"]


class BadFile(NamedTuple):
    """A file that cannot be decoded.

    Attributes:
        place: its number among the files that were to be decoded.
        reason: the path and what is wrong.
    """

    place: int
    reason: str


class Chunk(NamedTuple):
    """Some files in a row, decoded.

    Attributes:
        pixels: uint8 (m, C, H, W) of those that could be decoded.
        bad: the others.
    """

    pixels: Pixels
    bad: list[BadFile]


def decode_chunks(
    paths: Sequence[str | os.PathLike[str]],
    pixel_format: PixelFormat,
    max_pixels: int | None = None,
    *,
    other_sizes: OtherSizes = "raise",
) -> Generator[Chunk, None, None]:
    """Decode files in the order given, some at a time; only a few chunks are in memory at once.

    The decoders let go of Python's lock, so threads share the work. Images of a few thousand pixels are the exception:
    handing the lock over costs more than it gains. So the first chunks are decoded by one thread, the next by one per
    core, and the rest by whoever was faster; or, if that is one thread and much is left, by processes where they can be
    forked. A progress bar is shown on a terminal when there are many files.

    Args:
        paths: the files.
        pixel_format: how to decode, and the shape that all images must then have.
        max_pixels: see `decode_image`.
        other_sizes: images of another size than `pixel_format` says: "raise" at the first, which in training is seldom
            alone, or take them as "bad" files.

    Raises:
        DataError: an image of another size, the first there is, unless these are bad files.
    """
    size = max(1, min(_CHUNK, _CHUNK_BYTES // math.prod(pixel_format.shape)))
    job = partial(_decode, pixel_format=pixel_format, max_pixels=max_pixels, other_sizes=other_sizes)
    # Strings, which travel to another process in less time than paths.
    names = [os.fspath(path) for path in paths]
    console = Console(file=sys.stderr)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    hidden = len(paths) < _PROGRESS_FROM or not console.is_terminal
    with (
        contextlib.closing(_decoded(names, size, job)) as chunks,
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
    ):
        task = progress.add_task("", total=len(paths))
        for chunk in chunks:
            progress.advance(task, len(chunk.pixels) + len(chunk.bad))
            yield chunk


def _decode(
    names: Sequence[str], place: int, pixel_format: PixelFormat, max_pixels: int | None, other_sizes: OtherSizes
) -> Chunk:
    """Decode some files, the first of which is number `place`."""
    pixels = np.empty((len(names), *pixel_format.shape), dtype=np.uint8)
    bad: list[BadFile] = []
    for i, name in enumerate(names):
        try:
            image = decode_image(name, pixel_format.color, pixel_format.image_size, max_pixels)
        except DataError as error:
            bad.append(BadFile(place + i, str(error)))
            continue
        if image.shape != pixel_format.shape:
            message = _size_message(name, image, pixel_format)
            if other_sizes == "raise":
                raise DataError(message)
            bad.append(BadFile(place + i, message))
            continue
        pixels[i - len(bad)] = image
    return Chunk(pixels[: len(names) - len(bad)], bad)


def _decoded(
    names: Sequence[str], size: int, job: Callable[[Sequence[str], int], Chunk]
) -> Generator[Chunk, None, None]:
    """The chunks in order, by whoever decodes them fastest."""
    at = 0

    def jobs(count: int, files: int) -> Iterator[tuple[Sequence[str], int]]:
        """The next `count` jobs of so many files."""
        nonlocal at
        for start in range(at, min(at + count * files, len(names)), files):
            at = start + files
            yield names[start : start + files], start

    # Small, because one thread decodes some of them while the other cores wait.
    trial = -(-size // 4)

    def timed(pool: Executor, count: int) -> tuple[list[Chunk], float]:
        """The next chunks, and the seconds for each."""
        began = time.perf_counter()
        chunks = [future.result() for future in [pool.submit(job, *of) for of in jobs(count, trial)]]
        return chunks, (time.perf_counter() - began) / max(1, len(chunks))

    cores = available_cores()
    with contextlib.ExitStack() as stack:
        pool: Executor = stack.enter_context(_cancelled(ThreadPoolExecutor(1)))
        if cores > 1:
            yield from timed(pool, 1)[0]  # the first of all loads what is needed
            chunks, by_one = timed(pool, _TRIED)
            yield from chunks
            team = stack.enter_context(_cancelled(ThreadPoolExecutor(cores)))
            chunks, by_all = timed(team, _TRIED * cores)
            yield from chunks
            if by_all < _TEAM_SHARE * by_one:
                pool = team
            elif by_one * (len(names) - at) / trial > _WORTH_FORKING and can_fork():
                pool = stack.enter_context(_cancelled(_forked(cores)))
                size *= 4
        waiting = deque(pool.submit(job, *of) for of in jobs(4 * cores, size))
        while waiting:
            chunk = waiting.popleft().result()
            waiting.extend(pool.submit(job, *of) for of in jobs(1, size))
            yield chunk


@contextlib.contextmanager
def _cancelled(pool: Executor) -> Iterator[Executor]:
    """A pool that, on leaving, does not do what nobody waits for any more."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def can_fork() -> bool:
    """Whether this process may have forked children: Linux, as for the workers of a `DataLoader`."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def _forked(count: int) -> Executor:
    # Python warns of forks beside threads, whose locks stay as they are in the child; ours takes none of them.
    warnings.filterwarnings("ignore", message=r".*use of fork\(\) may lead to deadlocks", category=DeprecationWarning)
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin_child)


def _begin_child() -> None:
    """Leave Ctrl-C to the parent, die with it, and start no threads: OpenMP's do not survive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    die_with_parent = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)


def decode_good(
    paths: Sequence[str | os.PathLike[str]], pixel_format: PixelFormat, max_pixels: int | None = None
) -> tuple[Tensor, list[BadFile]]:
    """Decode files into memory as `decode_chunks` does: uint8 (m, C, H, W) of the good ones, and the bad ones."""
    images = torch.empty((len(paths), *pixel_format.shape), dtype=torch.uint8)
    out: Pixels = images.numpy()
    bad: list[BadFile] = []
    filled = 0
    for chunk in decode_chunks(paths, pixel_format, max_pixels):
        out[filled : filled + len(chunk.pixels)] = chunk.pixels
        filled += len(chunk.pixels)
        bad += chunk.bad
    return images[:filled], bad


def decode_files(
    paths: Sequence[str | os.PathLike[str]],
    pixel_format: PixelFormat,
    where: str = "images",
    max_pixels: int | None = None,
) -> Tensor:
    """Decode files into one tensor, uint8 (len(paths), C, H, W), in the order given.

    Args:
        paths: the files.
        pixel_format: how to decode, and the shape that all images must then have.
        where: what the files are, for the error message.
        max_pixels: see `decode_image`.

    Raises:
        DataError: files that cannot be decoded, the first 20 listed; or the first file of another size.
    """
    images, bad = decode_good(paths, pixel_format, max_pixels)
    if bad:
        raise DataError(bad_files_message([file.reason for file in bad], len(paths), where))
    return images


def bad_files_message(reasons: Sequence[str], total: int, where: str, verb: str = "read") -> str:
    """Say how many of `total` files are bad (cannot be `verb`) and list the first 20."""
    summary = f"{where}: {len(reasons)} of {total} images cannot be {verb}; repair or remove"
    if len(reasons) == 1:
        return f"{summary} {reasons[0]}"
    shown = [f"{summary} these files", *reasons[:_LISTED]]
    return "\n  ".join(shown if len(reasons) <= _LISTED else [*shown, f"and {len(reasons) - _LISTED} more"])


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


def available_cores() -> int:
    """Cores that this process may use: in a container or under a batch system, fewer than the machine has."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _size_message(path: str | os.PathLike[str], pixels: Pixels, expected: PixelFormat) -> str:
    (_, height, width), (_, rows, columns) = pixels.shape, expected.shape
    return (
        f"{Path(path)}: image is {width}×{height} pixels (width × height), the first training image is "
        f"{columns}×{rows}; train with image_size to resize all images to one size"
    )
