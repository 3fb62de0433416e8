"""Decoding many image files, in parallel and in order, with all bad files reported at once."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
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
    core, and the rest by whoever was faster. Processes would take longer to start than small images take to decode. A
    progress bar is shown on a terminal when there are many files.

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

    def decode(start: int) -> Chunk:
        stop = min(start + size, len(paths))
        pixels = np.empty((stop - start, *pixel_format.shape), dtype=np.uint8)
        bad = []
        for i in range(start, stop):
            try:
                image = decode_image(paths[i], pixel_format.color, pixel_format.image_size, max_pixels)
            except DataError as error:
                bad.append(BadFile(i, str(error)))
                continue
            if image.shape != pixel_format.shape:
                message = _size_message(paths[i], image, pixel_format)
                if other_sizes == "raise":
                    raise DataError(message)
                bad.append(BadFile(i, message))
                continue
            pixels[i - start - len(bad)] = image
        return Chunk(pixels[: stop - start - len(bad)], bad)

    console = Console(file=sys.stderr)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    hidden = len(paths) < _PROGRESS_FROM or not console.is_terminal
    starts = iter(range(0, len(paths), size))
    cores = available_cores()
    alone, team = ThreadPoolExecutor(1), ThreadPoolExecutor(cores)

    def timed(pool: ThreadPoolExecutor, count: int) -> tuple[list[Chunk], float]:
        """The next `count` chunks, and the seconds for each."""
        began = time.perf_counter()
        chunks = list(pool.map(decode, islice(starts, count)))
        return chunks, (time.perf_counter() - began) / max(1, len(chunks))

    def chosen() -> Generator[Chunk, None, ThreadPoolExecutor]:
        """The chunks by which the pool is chosen."""
        if cores == 1:
            return alone
        yield from timed(alone, 1)[0]  # the first of all loads what is needed
        chunks, by_one = timed(alone, _TRIED)
        yield from chunks
        chunks, by_all = timed(team, _TRIED * cores)
        yield from chunks
        return team if by_all < 0.9 * by_one else alone

    def decoded() -> Generator[Chunk, None, None]:
        pool = yield from chosen()
        waiting: deque[Future[Chunk]] = deque(pool.submit(decode, start) for start in islice(starts, 4 * cores))
        while waiting:
            chunk = waiting.popleft().result()
            waiting.extend(pool.submit(decode, start) for start in islice(starts, 1))
            yield chunk

    try:
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            task = progress.add_task("", total=len(paths))
            for chunk in decoded():
                progress.advance(task, len(chunk.pixels) + len(chunk.bad))
                yield chunk
    finally:
        for pool in (alone, team):
            pool.shutdown(cancel_futures=True)


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
