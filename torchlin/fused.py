"""The loss of a head in one autograd node, for the step of an optimizer: its arithmetic takes less time than autograd.

Scores, loss and both gradients are computed at once: with G = ∂L/∂Z the chain rule has a single step left,

    ∂/∂b̃ = Σ g_i,    ∂/∂W̃ = Gᵀ X̃ = (Gᵀ R − (Σ g_i) mᵀ) / s        x̃ = (r − m)/s, see `StandardizedHead.coordinates`

and backward only multiplies by the upstream number. Nothing the size of a batch is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin.autograd import masked
from torchlin.heads import StandardizedHead, without_autocast
from torchlin.loss import Loss, Total, tracing

# MKL multiplies W Xᵀ in half the time of X Wᵀ if X has at most so many rows, and in twice the time if more.
_FEW_ROWS = 128


def total_and_scores(
    head: StandardizedHead, x: Tensor, target: Tensor, loss: Loss, *, all_count: bool = False
) -> tuple[Total, Tensor]:
    """`loss.total(head(x), target)` and the scores (n, k), from which no gradient flows back.

    Differentiable once, in the parameters of the head and not in x; the caller makes sure that no more is wanted.
    """
    plain = target.dim() == 1 and not target.is_floating_point() and x.shape[:1] == target.shape
    if not plain or head.bias is None or x.requires_grad or tracing():
        scores = head(x)
        return loss.total(scores, target, all_count=all_count), scores.detach()
    rows, mean, std = head.coordinates(x)
    with without_autocast(x.device.type):
        scores = _scores(rows, head.weight.detach(), head.bias.detach(), mean, std)
        encoded, weight, counting = loss.prepare(scores, target, all_count=all_count)
        summed: Tensor = _Sum.apply(head.weight, head.bias, scores, rows, mean, std, encoded, loss)
    return Total(summed, weight, counting), scores


def _scores(rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    raw = (weight / std).to(rows.dtype)
    bias = torch.addmv(bias, raw.to(bias.dtype), mean, alpha=-1)
    if rows.dtype != bias.dtype:
        return F.linear(rows, raw).to(bias.dtype) + bias
    if len(rows) <= _FEW_ROWS and rows.device.type == "cpu":
        return torch.addmm(bias.unsqueeze(1), raw, rows.t()).t().contiguous()
    return F.linear(rows, raw, bias)


class _Sum(torch.autograd.Function):
    """Σ c_i L_i of scores that a head gave, differentiable in the head's W̃ and b̃."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        scores: Tensor,
        rows: Tensor,
        mean: Tensor,
        std: Tensor,
        encoded: Any,
        loss: Loss,
    ) -> Tensor:
        target, coefficient, _ = encoded
        values, gradient = loss.value_and_gradient(scores, target)
        if coefficient is not None:
            values = masked(values * coefficient, coefficient)
            gradient = masked(gradient.mul_(coefficient.unsqueeze(1)), coefficient)
        in_bias = gradient.sum(0)
        product = gradient.to(rows.dtype).t() @ rows
        ctx.in_weight = torch.addr(product.to(in_bias.dtype), in_bias, mean, alpha=-1).div_(std)
        ctx.in_bias = in_bias
        return values.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.in_weight * upstream, ctx.in_bias * upstream, None, None, None, None, None, None
