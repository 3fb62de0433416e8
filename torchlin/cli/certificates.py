"""What a run's head is worth: its objective, and how far above the optimum of that it can be at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchlin.data.loading import ArrayDataset
from torchlin.heads import LinearHead, Standardization
from torchlin.losses import LOSS_REGISTRY
from torchlin.machine import available_memory
from torchlin.penalties import PENALTY_REGISTRY
from torchlin.solvers import Certificate, certify

# The dual solver of a hinge loss takes minutes on more numbers than these.
_HINGE_NUMBERS = 20_000_000
_TOL = 1e-3


def split_arrays(data: Any, splits: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Inputs (n, …) and targets (n,) of some splits of a data module, in memory."""
    loaders = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for split in splits:
        loader: Iterable[tuple[Tensor, Tensor]] = loaders[split]()
        dataset = getattr(loader, "dataset", None)
        # In order and as they are, where the data can be asked for that: a training loader shuffles and augments.
        batches = [dataset.gather(torch.arange(len(dataset)))] if isinstance(dataset, ArrayDataset) else loader
        for x, y in batches:
            inputs.append(x)
            targets.append(y)
    return torch.cat(inputs), torch.cat(targets)


def fits_in_memory(data: Any, splits: Sequence[str]) -> bool:
    """Whether splits can be gathered, with room for the solver."""
    numbers = sum(data.sizes[split] for split in splits) * data.in_features
    size = 1 if data.input_info["kind"] == "pixels" else 4
    return bool(3 * size * numbers <= available_memory(torch.device("cpu")))


def certificate_line(folder: Path, head: LinearHead, data: Any) -> str:
    """One line on how far a run's head is from the optimum of its own objective; empty where that is not known.

    The objective is that of the data it was trained on, which have to be the data given, in memory.
    """
    info = head.info
    splits = info.get("trained_on", ["train"])
    loss = LOSS_REGISTRY.make(info["loss"])
    penalty = None if info.get("penalty") is None else PENALTY_REGISTRY.make(info["penalty"])
    known = info.get("data", {}).get("sizes")
    if known is None or known != getattr(data, "sizes", None) or not fits_in_memory(data, splits):
        return ""
    if loss.smoothness(head.out_features) is None and sum(known[s] for s in splits) * head.in_features > _HINGE_NUMBERS:
        return f"objective: too many data to certify the {loss.name} loss here; torchlin.certify does it in minutes"
    tensors = load_file(folder / "head.safetensors")
    if "mean" not in tensors:
        return ""
    x, y = split_arrays(data, splits)
    moments = Standardization(tensors["mean"], tensors["std"])
    return described(certify(head, x, y, loss, penalty, standardize=moments, tol=_TOL, max_passes=200))


def described(found: Certificate) -> str:
    """A certificate in words."""
    if found.measure != "gap":
        return f"objective {found.primal:.6g}; no bound on its distance from the optimum: {found.reason}"
    excess = max(0.0, found.primal - found.dual)
    share = f" ({excess / found.primal:.2g} of it)" if found.primal > 0 else ""
    return f"objective {found.primal:.6g}, certified to be at most {excess:.2g} above its optimum{share}"
