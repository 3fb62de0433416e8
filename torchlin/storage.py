"""A head on disk: head.safetensors (weight, bias, and the mean and std that were folded in) and head.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchlin.heads import LinearHead, Standardization, StandardizedHead, split_bias
from torchlin.losses import LOSS_REGISTRY, Loss
from torchlin.registry import nearest

FORMAT = 1


def save_head(
    head: LinearHead,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    loss: Loss | str | Mapping[str, Any],
    standardization: Standardization | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write `head.safetensors` and `head.json` into the folder `path`; each file replaces the old one whole.

    Args:
        head: acts on raw input (fold a standardised one first).
        path: a folder; made if it does not exist.
        class_names: in the order of the scores (two names for a head with a single score).
        loss: what it was trained with, for `predict_proba`.
        standardization: μ and σ that were folded into the head, kept for the record.
        info: further entries of head.json (input, penalty, metrics, …): strings, numbers, lists and mappings.

    Raises:
        ValueError: the number of class names does not match the head.
    """
    from safetensors.torch import save

    if isinstance(head, StandardizedHead):
        head = head.fold()
    if head.holds_bias:
        head = split_bias(head)
    loss = LOSS_REGISTRY.make(loss)
    expected = loss.classes(head.out_features)
    if len(class_names) != expected:
        raise ValueError(f"{len(class_names)} class names for a head of {expected} classes under the {loss.name} loss")
    tensors = {"weight": head.weight.detach()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    if standardization is not None:
        tensors |= {"mean": standardization.mean, "std": standardization.std}
    document = {
        **head.info,
        **(info or {}),
        "format": FORMAT,
        "class_names": [str(name) for name in class_names],
        "in_features": head.in_features,
        "num_classes": expected,
        "loss": LOSS_REGISTRY.spec(loss),
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    weights = save({k: v.cpu().contiguous() for k, v in tensors.items()})
    replace_files({folder / "head.safetensors": weights, folder / "head.json": text.encode()})
    return folder


def load_head(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> LinearHead:
    """The head of a run folder (or of any folder that `save_head` wrote), on raw input. Nothing is unpickled.

    Args:
        path: the folder, or the head.safetensors in it.
        map_location: the device to put it on.

    Raises:
        FileNotFoundError: no such folder, or no head in it.
        ValueError: a file that is damaged, of a newer format, or two files that do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    if folder.name == "head.safetensors":
        folder = folder.parent
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileNotFoundError(f"{folder}: no such run folder{nearest(folder.name, siblings)}")
    for name in ("head.safetensors", "head.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: holds no {name}, so it is not a finished run")
    try:
        info = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        version = info["format"]
        stated = (len(info["class_names"]), info["in_features"], info["loss"]["name"]) if version == FORMAT else None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'head.json'}: damaged, not the description of a head ({error})") from None
    if stated is None:
        raise ValueError(
            f"{folder / 'head.json'}: format {version}, this torchlin reads format {FORMAT}: update torchlin"
        )
    try:
        tensors = load_file(folder / "head.safetensors", device=str(map_location))
        weight = tensors["weight"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / 'head.safetensors'}: damaged, no weights can be read from it ({error})") from None
    bias = tensors.get("bias")
    classes, features, loss = stated
    if weight.dim() != 2 or not _fits(loss, classes, weight.shape[0]) or weight.shape[1] != features:
        raise ValueError(
            f"{folder}: head.safetensors has weight {tuple(weight.shape)}, but head.json speaks of {classes} classes "
            f"and {features} features"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{folder / 'head.safetensors'}: damaged, weight {tuple(weight.shape)} with bias {tuple(bias.shape)}"
        )
    head = LinearHead(weight.shape[1], weight.shape[0], bias is not None, device=map_location, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    head.info = info
    return head


def _fits(loss: str, classes: int, outputs: int) -> bool:
    """Whether a loss may have so many scores for so many classes; a user's own loss need not be importable here."""
    if loss not in LOSS_REGISTRY.names():
        return outputs in (classes, 1)
    try:
        return LOSS_REGISTRY.find(loss).outputs(classes) == outputs
    except ValueError:  # logistic with other than two classes
        return False


def replace_file(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a reader or a crash sees the old file or the new one, never a part."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of them beside, and rename when all are there: files that belong together change together."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, content in contents.items():
            with beside[path].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, part in beside.items():
            part.replace(path)
    except BaseException:
        for part in beside.values():
            part.unlink(missing_ok=True)
        raise
