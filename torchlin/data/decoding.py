"""Decoding many image files into one array, in parallel, with all bad files reported at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat, Pixels, decode_image

_CHUNK = 64
_PROGRESS_FROM = 2000
_LISTED = 20


def decode_files(paths: Sequence[Path], pixel_format: PixelFormat, where: str = "images") -> Tensor:
    """Decode files into one preallocated tensor, in the order given.

    Pillow lets go of Python's lock while it decodes, so threads share the work; a progress bar is shown on a
    terminal when there are many files.

    Args:
        paths: the files.
        pixel_format: how to decode, and the shape that all images must then have.
        where: what the files are, for the error message.

    Returns:
        uint8 (len(paths), C, H, W).

    Raises:
        DataError: files that cannot be decoded, the first 20 listed; or the first file of another size.
    """
    images = torch.empty((len(paths), *pixel_format.shape), dtype=torch.uint8)
    out: Pixels = images.numpy()
    bad: list[str] = []

    def decode_chunk(start: int) -> list[str]:
        errors = []
        for i in range(start, min(start + _CHUNK, len(paths))):
            try:
                pixels = decode_image(paths[i], pixel_format.color, pixel_format.image_size)
            except DataError as error:
                errors.append(str(error))
                continue
            if pixels.shape != pixel_format.shape:
                raise DataError(_size_message(paths[i], pixels, pixel_format))
            out[i] = pixels
        return errors

    console = Console(file=sys.stderr)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(paths) < _PROGRESS_FROM or not console.is_terminal
    with (
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("", total=len(paths))
        for errors in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
            bad += errors
            progress.advance(task, _CHUNK)
    if bad:
        raise DataError(_bad_files_message(bad, len(paths), where))
    return images


def _size_message(path: Path, pixels: Pixels, expected: PixelFormat) -> str:
    (_, height, width), (_, rows, columns) = pixels.shape, expected.shape
    return (
        f"{path}: image is {width}×{height} pixels (width × height), the first training image is "
        f"{columns}×{rows}; train with image_size to resize all images to one size"
    )


def _bad_files_message(bad: Sequence[str], total: int, where: str) -> str:
    summary = f"{where}: {len(bad)} of {total} images cannot be read; repair or remove"
    if len(bad) == 1:
        return f"{summary} {bad[0]}"
    shown = [f"{summary} these files", *bad[:_LISTED]]
    return "\n  ".join(shown if len(bad) <= _LISTED else [*shown, f"and {len(bad) - _LISTED} more"])
