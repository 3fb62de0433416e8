"""Labelling image files with a trained head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from torchlin.data.decoding import decode_files
from torchlin.data.errors import DataError
from torchlin.data.images import PixelFormat, list_images
from torchlin.heads import LinearHead


@torch.no_grad()
def predict_images(
    head: LinearHead, paths: Sequence[str | os.PathLike[str]], *, batch_size: int = 1024, all_scores: bool = False
) -> list[list[str]]:
    """Rows file, label, score, probability (and with `all_scores` one score per class), in the order of the input.

    The images are decoded and resized as the training images were. The score is that of the chosen class; the
    probability is empty for a loss that defines none. A folder stands for the images in it, sorted by name.

    Raises:
        DataError: a file that is missing or no image (all of them are listed), an image of another size.
        ValueError: the head was not trained on images.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    if head.info.get("input", {}).get("kind") != "pixels":
        raise ValueError("this head was not trained on images, so it cannot label image files")
    files = [file for path in paths for file in _files(Path(path))]
    pixel_format = PixelFormat.from_info(head.info["input"])
    rows: list[list[str]] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        rows += _rows(head, batch, decode_files(batch, pixel_format), all_scores)
    return rows


def _rows(head: LinearHead, files: Sequence[Path], images: torch.Tensor, all_scores: bool) -> list[list[str]]:
    names: list[str] = head.info["class_names"]
    scores = head(images)
    labels = head.decide(scores)
    try:
        probability = head.probabilities(scores).gather(1, labels.unsqueeze(1)).squeeze(1)
        shares = [f"{p:.6g}" for p in probability.tolist()]
    except TypeError:  # the loss defines no probabilities
        shares = [""] * len(files)
    if scores.shape[1] == 1:  # one score z speaks for class 1, and −z for class 0
        scores = torch.cat((-scores, scores), 1)
    chosen = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    rows = []
    for file, label, score, share, row in zip(files, labels.tolist(), chosen.tolist(), shares, scores, strict=True):
        extra = [f"{s:.6g}" for s in row.tolist()] if all_scores else []
        rows.append([str(file), names[label], f"{score:.6g}", share, *extra])
    return rows


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return [path]
    found = list_images(path)
    if not found:
        raise DataError(f"{path}: no images found in this folder")
    return found
