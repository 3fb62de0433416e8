"""Every loss written a second time, from its formula, in plain PyTorch operations that autograd differentiates."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlin.losses import LOSSES, LogisticLoss, Loss

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")


def _violations(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    """max(0, z_j − z_y + Δ), 0 at j = y."""
    lead = scores - scores.gather(1, target.unsqueeze(1)) + margin
    own = torch.nn.functional.one_hot(target, scores.shape[1]).bool()
    return lead.relu().masked_fill(own, 0)


def _perceptron(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    return _violations(scores, target, 0).sum(1)


def _hinge(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    return _violations(scores, target, loss.margin).sum(1)


def _crammer_singer(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    return _violations(scores, target, loss.margin).amax(1)


def _squared_hinge(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    return (_violations(scores, target, loss.margin) ** 2).sum(1)


def _softmax(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    log_p = scores - scores.logsumexp(1, keepdim=True)
    hard = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    if loss.label_smoothing == 0:
        return hard
    weight = torch.ones_like(scores[0]) if loss.weight is None else loss.weight.to(scores)
    # The class weight of the smooth part stands inside; the caller multiplies the whole by w_y.
    smooth = -(weight * log_p).mean(1) / weight[target]
    return (1 - loss.label_smoothing) * hard + loss.label_smoothing * smooth


def _logistic(scores: Tensor, target: Tensor, loss: Any) -> Tensor:
    p, y = torch.sigmoid(scores[:, 0]), target.to(scores.dtype)
    return -y * torch.log(p) - (1 - y) * torch.log(1 - p)


FORMULAS = {
    "perceptron": _perceptron,
    "hinge": _hinge,
    "crammer_singer": _crammer_singer,
    "squared_hinge": _squared_hinge,
    "softmax": _softmax,
    "logistic": _logistic,
}


def plain(loss: Any, scores: Tensor, target: Tensor) -> Tensor:
    """loss(scores, target) for scores (n, k) with at least one sample that counts."""
    counts = target != loss.ignore_index
    safe = torch.where(counts, target, 0)
    share = counts.to(scores.dtype)
    if loss.weight is not None:
        share = share * loss.weight.to(scores)[safe]
    values = FORMULAS[loss.name](scores, safe, loss) * share
    if loss.reduction == "none":
        return values
    return values.sum() if loss.reduction == "sum" else values.sum() / share.sum()


def classes_of(cls: type[Loss]) -> int:
    return 2 if issubclass(cls, LogisticLoss) else 4


def option_sets(cls: type[Loss]) -> dict[str, dict[str, Any]]:
    """Options by a readable name; a loss with further options of its own gets sets for those too."""
    weight = torch.tensor([0.5, 2.0, 1.25, 0.75])[: classes_of(cls)]
    sets: dict[str, dict[str, Any]] = {
        "default": {},
        "weight": {"weight": weight},
        "ignore": {"ignore_index": -100},
        "ignore_class_1": {"ignore_index": 1},
        "weight_ignore": {"weight": weight, "ignore_index": 255},
    }
    own = inspect.signature(cls).parameters
    if "margin" in own:
        sets["margin"] = {"margin": 0.3}
        sets["margin_weight_ignore"] = {"margin": 2.5, "weight": weight, "ignore_index": -1}
    if "label_smoothing" in own:
        sets["smoothing"] = {"label_smoothing": 0.1}
        sets["smoothing_weight_ignore"] = {"label_smoothing": 0.3, "weight": weight, "ignore_index": -1}
    return sets


def each_loss() -> list[Any]:
    return [pytest.param(cls, id=cls.name) for cls in LOSSES]


def each_loss_and_options() -> list[Any]:
    return [
        pytest.param(cls, options, id=f"{cls.name}-{name}")
        for cls in LOSSES
        for name, options in option_sets(cls).items()
    ]


def batch(loss: Loss, n: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random scores at least 0.01 away from every kink, and targets of which some are ignored if an index says so."""
    cls = type(loss)
    classes = classes_of(cls)
    margin = getattr(loss, "margin", 0.0)
    target = torch.arange(n) % classes
    rows = []
    while len(rows) < n:
        z = (2 * torch.randn(cls.outputs(classes))).to(dtype)
        others = (z[:, None] - z[None, :]).double()
        apart = others[~torch.eye(len(z), dtype=torch.bool)]
        if bool((apart.abs() > 0.01).all() and ((apart + margin).abs() > 0.01).all()):
            rows.append(z)
    if loss.ignore_index != 1 and n > 1:
        target[1] = loss.ignore_index
    return torch.stack(rows), target
