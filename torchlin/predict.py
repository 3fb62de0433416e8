"""Labelling image files with a trained head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from torchlin.data.decoding import BadFile, bad_files_message, decode_chunks
from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat, Pixels, scan_images
from torchlin.heads import LinearHead

OnError = Literal["stop", "skip"]


def predict_images(
    head: LinearHead,
    paths: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 1024,
    all_scores: bool = False,
    max_pixels: int | None = None,
    on_error: OnError = "stop",
    scores_of: Callable[[Tensor], Tensor] | None = None,
) -> list[list[str]]:
    """Rows file, label, score, probability (and with `all_scores` one score per class), in the order of the input.

    The images are decoded and resized as the training images were. The score is that of the chosen class; the
    probability is empty for a loss that defines none. A folder stands for the images in it, sorted by name. Beside the
    rows, no more than a batch of images and those being decoded are in memory.

    Args:
        head: trained on images, as `load_head` returns it.
        paths: image files and folders.
        batch_size: images per matrix product.
        all_scores: add the scores of all classes to each row.
        max_pixels: images of more pixels than this are bad files, found before they fill the memory; None for Pillow's
            own limit (89 million unless changed).
        on_error: what to do about bad files, those that cannot be decoded or have another size than the training
            images: "stop" and list them once all files were tried, or "skip" them with a warning that names them all.
        scores_of: from images uint8 (b, C, H, W) to scores, where the head acts on features of them; None for the head.

    Raises:
        DataError: a path that does not exist; with "stop" bad files (the first 20 are listed); with "skip" nothing
            but bad files.
        ValueError: the head was not trained on images, or an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels is at least 1, got {max_pixels}")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    if head.info.get("input", {}).get("kind") != "pixels":
        raise ValueError("this head was not trained on images, so it cannot label image files")
    files = [file for path in paths for file in _files(Path(path))]
    pixel_format = PixelFormat.from_info(head.info["input"])
    rows: list[list[str]] = []
    bad: list[BadFile] = []
    for names, images in _batches(files, pixel_format, batch_size, max_pixels, bad):
        if not bad or on_error == "skip":  # otherwise only the other bad files are still of interest
            with torch.no_grad():
                scores = scores_of(images) if scores_of else head(images)
            rows += _rows(head, names, scores, all_scores)
    if bad:
        reasons = [file.reason for file in bad]
        if on_error == "stop":
            raise DataError(bad_files_message(reasons, len(files), "images", "labelled"))
        if len(bad) == len(files):
            raise DataError(f"none of {len(files)} images can be labelled, such as {reasons[0]}")
        warnings.warn(
            "\n  ".join([f"left out {len(bad)} of {len(files)} images that cannot be labelled", *reasons]), stacklevel=2
        )
    return rows


def _batches(
    files: Sequence[str], pixel_format: PixelFormat, batch_size: int, max_pixels: int | None, bad: list[BadFile]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and images (b, C, H, W) of the good files; the bad ones are added to `bad` as they are found."""
    images = torch.empty((min(batch_size, len(files)), *pixel_format.shape), dtype=torch.uint8)
    out: Pixels = images.numpy()  # a copy by torch would wake its threads, which then wait busily beside the decoder
    names: list[str] = []
    start = 0
    with closing(decode_chunks(files, pixel_format, max_pixels, other_sizes="bad")) as chunks:
        for chunk in chunks:
            bad += chunk.bad
            left_out = {file.place for file in chunk.bad}
            stop = start + len(chunk.pixels) + len(left_out)
            good = [files[i] for i in range(start, stop) if i not in left_out]
            start = stop
            pixels = chunk.pixels
            while good:
                room = len(images) - len(names)
                out[len(names) : len(names) + len(good[:room])] = pixels[:room]
                names += good[:room]
                good, pixels = good[room:], pixels[room:]
                if len(names) == len(images):
                    yield names, images
                    names = []
    if names:
        yield names, images[: len(names)]


def _rows(head: LinearHead, files: Sequence[str], scores: Tensor, all_scores: bool) -> list[list[str]]:
    names: list[str] = head.info["class_names"]
    labels = head.decide(scores)
    try:
        probability = head.probabilities(scores).gather(1, labels.unsqueeze(1)).squeeze(1)
        shares = [f"{p:.6g}" for p in probability.tolist()]
    except TypeError:  # the loss defines no probabilities
        shares = [""] * len(files)
    if scores.shape[1] == 1:  # one score z speaks for class 1, and −z for class 0
        scores = torch.cat((-scores, scores), 1)
    chosen = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    rows = [
        [file, names[label], f"{score:.6g}", share]
        for file, label, score, share in zip(files, labels.tolist(), chosen.tolist(), shares, strict=True)
    ]
    if all_scores:
        for row, numbers in zip(rows, scores.tolist(), strict=True):
            row += [f"{number:.6g}" for number in numbers]
    return rows


def _files(path: Path) -> list[str]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return [str(path)]
    found = scan_images(path)
    if not found:
        raise DataError(f"{path}: no images found in this folder")
    # As pathlib writes them, without its cost for each file: "a.png" in ".", not "./a.png".
    return [file.path.removeprefix(f".{os.sep}") for file in found]
