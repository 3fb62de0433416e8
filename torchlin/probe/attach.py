"""A backbone with its head in place: one module, to train further, compile or export."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from torchlin.heads import LinearHead
from torchlin.probe.backbone import Backbone, Reader, load_backbone
from torchlin.probe.preprocess import Preprocess
from torchlin.probe.probe import ProbeResult
from torchlin.storage import load_head

# The weights of a backbone that can be had nowhere else, in a run folder.
BACKBONE_FILE = "backbone.safetensors"


class ProbedModel(nn.Module):
    """The head on the features of a network: what `preprocess` yields → scores (b, k).

    An ordinary module: it follows `train()`, all its parameters require gradients, it compiles and exports.

    Attributes:
        reader: the network up to the layer that is read, and its pooling.
        head: a `LinearHead` on raw features, into which the standardisation was folded; `head.info` is head.json.
        preprocess: from images uint8 (b, C, H, W) to what `forward` takes; no part of it.
    """

    def __init__(self, reader: Reader, head: LinearHead, preprocess: Preprocess) -> None:
        super().__init__()
        self.reader, self.head, self.preprocess = reader, head, preprocess

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.reader(x))
        return scores


def attach_head(backbone: Backbone, run: str | os.PathLike[str] | ProbeResult | LinearHead) -> ProbedModel:
    """A copy of a backbone with the head of a probe in place; the backbone stays as it is.

    In eval mode `attach_head(backbone, run)(backbone.preprocess(images))` are the probe's scores.

    Args:
        backbone: the frozen backbone that the head was trained on.
        run: a run folder, what `LinearProbe.fit` returned, or the head itself.

    Raises:
        ValueError: the head was trained on the features of another backbone, as far as that is known.
        FileNotFoundError: no such run.
    """
    found = run.head if isinstance(run, ProbeResult) else run
    head = found if isinstance(found, LinearHead) else load_head(found)
    known = head.info.get("backbone")
    if known is not None:
        here = {key: value for key, value in backbone.info().items() if key != "source"}
        other = [key for key in here if key in known and known[key] != here[key]]
        if other:
            key = other[0]
            raise ValueError(f"the head was trained with {key}={known[key]!r}, but this backbone has {here[key]!r}")
    head = copy.deepcopy(head)
    device = next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
    model = ProbedModel(copy.deepcopy(backbone.reader), head.to(device), copy.deepcopy(backbone.preprocess))
    return model.requires_grad_(True).eval()


def own_weights(backbone: Backbone) -> dict[str, Tensor] | None:
    """The weights that a run folder has to keep, because they are random or were learned; None for others."""
    if backbone.learner is None and (backbone.source is None or backbone.source["weights"] is not None):
        return None
    return {name: t.detach().cpu().contiguous() for name, t in backbone.reader.network.state_dict().items()}


def load_probe(folder: str | os.PathLike[str]) -> ProbedModel:
    """The backbone and the head of a run folder that `torchlin probe` wrote.

    Raises:
        ValueError: no probe's run folder; a backbone that a script made, which only the script can make again; weights
            that are no longer those that the head was trained on.
        FileNotFoundError: no such run, or the checkpoint of the backbone is gone.
    """
    path = Path(folder)
    head = load_head(path)
    known: Mapping[str, Any] | None = head.info.get("backbone")
    if known is None:
        raise ValueError(f"{path}: is no probe, its head acts on the data themselves: use load_head")
    source = known["source"]
    if source is None:
        raise ValueError(
            f"{path}: its backbone {known['name']!r} was made by a script, which has to make it again: "
            "attach_head(backbone, run)"
        )
    backbone = load_backbone(
        source["name"], weights=source["weights"], layer=known["layer"], pooling=known["pooling"],
        select=known["select"], preprocess=known["preprocess"], patches=source.get("patches", 1600),
        flip=source.get("flip", True), seed=source["seed"],
    )  # fmt: skip
    if (path / BACKBONE_FILE).is_file():
        backbone.reader.network.load_state_dict(load_file(path / BACKBONE_FILE))
    elif backbone.fingerprint() != known["fingerprint"]:
        raise ValueError(f"{path}: the weights of {known['name']} are no longer those that its head was trained on")
    return attach_head(backbone, head)
