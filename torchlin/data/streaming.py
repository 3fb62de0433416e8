"""Images that are decoded when they are asked for, and not kept."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

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
        self._pool_of = 0  # the process whose threads these are
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

        # The workers of a DataLoader share the cores already.
        threads = 1 if get_worker_info() is not None else self._threads

        def decode(first: int) -> None:
            for i in range(first, len(chosen), threads):
                out[i] = self._decode(chosen[i])

        if threads == 1:
            decode(0)
        else:
            list(self._own_pool(threads).map(decode, range(threads)))
        return images

    def _own_pool(self, threads: int) -> ThreadPoolExecutor:
        # A forked process has the pool of its parent, but not the threads: waiting for those never ends.
        if self._pool is None or self._pool_of != os.getpid():
            self._pool, self._pool_of = ThreadPoolExecutor(threads), os.getpid()
        return self._pool

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
