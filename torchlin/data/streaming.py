"""Images that are decoded when they are asked for, and not kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from torchlin.data.decoding import BadFile, available_cores, decode_chunks, decode_files
from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat, Pixels, decode_image

# More images than this in one request are worth a progress bar.
_MANY = 2048
# So many images are decoded to see whether several threads are worth it.
_TRIED = 9
# If they take less than so many seconds each, two threads were slower than one: both want Python's lock.
_QUICK = 75e-6


class FileImages:
    """Image files as rows of pixels, uint8 (n, C, H, W), of which only those asked for are in memory.

    Args:
        paths: the files.
        pixel_format: how to decode them, and the shape that all have.
        max_pixels: see `decode_image`.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, paths: Sequence[str], pixel_format: PixelFormat, max_pixels: int | None = None) -> None:
        self.paths = paths
        self.pixel_format = pixel_format
        self.max_pixels = max_pixels
        self.shape = torch.Size((len(paths), *pixel_format.shape))
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 0  # not known yet

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Decode the files `index`, int64 (b,), in this order; `dim` is 0.

        Raises:
            DataError: a file that was good and no longer is.
        """
        chosen = [self.paths[i] for i in index.tolist()]
        if len(chosen) > _MANY:
            return decode_files(chosen, self.pixel_format, max_pixels=self.max_pixels)
        images = torch.empty((len(chosen), *self.pixel_format.shape), dtype=torch.uint8)
        out: Pixels = images.numpy()
        if not self._threads:
            seconds = statistics.median(self._seconds(path) for path in chosen[:_TRIED]) if chosen else 0
            self._threads = 1 if seconds < _QUICK else available_cores()

        def decode(first: int) -> None:
            for i in range(first, len(chosen), self._threads):
                out[i] = self._decode(chosen[i])

        if self._threads == 1:
            decode(0)
        else:
            self._pool = self._pool or ThreadPoolExecutor(self._threads)
            list(self._pool.map(decode, range(self._threads)))
        return images

    def _seconds(self, path: str) -> float:
        began = time.perf_counter()
        self._decode(path)
        return time.perf_counter() - began

    def _decode(self, path: str) -> Pixels:
        image = decode_image(path, self.pixel_format.color, self.pixel_format.image_size, self.max_pixels)
        if image.shape != self.pixel_format.shape:
            raise DataError(f"{path}: is now of another size than when the run began")
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}  # threads do not go along into a worker process


def check_files(paths: Sequence[str], pixel_format: PixelFormat, max_pixels: int | None = None) -> list[BadFile]:
    """Decode all files once, keep nothing, and return the bad ones.

    Raises:
        DataError: an image of another size.
    """
    return [file for chunk in decode_chunks(paths, pixel_format, max_pixels) for file in chunk.bad]
