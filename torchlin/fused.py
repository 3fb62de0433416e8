"""The loss of a head in one autograd node, for the step of an optimizer: its arithmetic takes less time than autograd.

Scores, loss and both gradients are computed at once: with G = ∂L/∂Z the chain rule has a single step left,

    ∂/∂b̃ = Σ g_i,    ∂/∂W̃ = Gᵀ X̃ = (Gᵀ R − (Σ g_i) mᵀ) / s        x̃ = (r − m)/s, see `StandardizedHead.coordinates`

and backward only multiplies by the upstream number. Nothing the size of a batch is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlin.autograd import masked
from torchlin.heads import StandardizedHead, folded_scores, half_precision, without_autocast
from torchlin.loss import Encoded, Loss, Total, tracing

# So many numbers are multiplied at a time, 32 MiB as float32.
_BLOCK_NUMBERS = 2**23


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
    size = max(1, _BLOCK_NUMBERS // head.in_features)
    blocks = _Blocks(head, x.split(size) if len(x) > size else [x])
    with without_autocast(x.device.type):
        scores = blocks.scores()
        if not torch.is_grad_enabled():
            return loss.total(scores, target, all_count=all_count), scores
        encoded, weight, counting = loss.prepare(scores, target, all_count=all_count)
        summed: Tensor = _Sum.apply(head.weight, head.bias, scores, blocks, encoded, loss)
    return Total(summed, weight, counting), scores


class _Blocks:
    """A batch in blocks of rows: as floating point, a whole batch of wide images takes hundreds of megabytes."""

    def __init__(self, head: StandardizedHead, inputs: Sequence[Tensor]) -> None:
        self.head = head
        self.inputs = inputs
        # A single block is used twice; of several, each is converted twice, which takes less time than it seems: they
        # stay in the cache.
        self.half = half_precision(inputs[0].device.type)
        self.kept = head.coordinates(inputs[0], self.half) if len(inputs) == 1 else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(r, m, s) of each block, see `StandardizedHead.coordinates`."""
        if self.kept is not None:
            yield self.kept
            return
        for x in self.inputs:
            yield self.head.coordinates(x, self.half)

    def scores(self) -> Tensor:
        """Z, (n, k)."""
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        scores = [folded_scores(rows, weight, bias, mean, std) for rows, mean, std in self]
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gᵀ X̃ (k, p) and Σ g_i (k,), for G (n, k)."""
        in_bias = gradient.sum(0)
        total = torch.zeros((), dtype=in_bias.dtype, device=in_bias.device)
        start = 0
        for block in self:
            rows, mean, std = block  # m and s are the same for all
            part = (gradient[start : start + len(rows)].to(rows.dtype).t() @ rows).to(in_bias.dtype)
            total = part if start == 0 else total.add_(part)
            start += len(rows)
        return total.addr_(in_bias, mean, alpha=-1).div_(std), in_bias


class _Sum(torch.autograd.Function):
    """Σ c_i L_i of scores that a head gave, differentiable in the head's W̃ and b̃."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, scores: Tensor, blocks: _Blocks, encoded: Encoded, loss: Loss
    ) -> Tensor:
        target, coefficient, _ = encoded
        values, gradient = loss.value_and_gradient(scores, target)
        if coefficient is not None:
            values = masked(values * coefficient, coefficient)
            gradient = masked(gradient.mul_(coefficient.unsqueeze(1)), coefficient)
        ctx.in_weight, ctx.in_bias = blocks.gradients(gradient)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.in_weight * upstream, ctx.in_bias * upstream, None, None, None, None
