"""Linear heads z = Wx + b, and the bias trick."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.losses import LOSS_REGISTRY

# MKL multiplies W Xᵀ in half the time of X Wᵀ if X has at most so many rows, and in twice the time if more.
_FEW_ROWS = 128

Init = Literal["zeros", "normal", "linear"]


class Standardization(NamedTuple):
    """μ and σ of the features, (p,), in raw-input coordinates (pixels: x/255). σ is 1 for a constant feature."""

    mean: Tensor
    std: Tensor


class LinearHead(nn.Linear):
    """A linear classifier z = Wx + b that returns raw scores; an `nn.Linear` with a classifier's manners.

    Args:
        in_features: p, the number of features.
        num_classes: k, the number of scores (1 for the logistic loss: `loss.outputs(2)`).
        bias: whether there is a b.
        init: "zeros" (every loss here is convex, so no symmetry needs breaking), "normal" (standard deviation 0.01,
            b = 0) or "linear" (that of `nn.Linear`).

    Input (…, p) is taken as `nn.Linear` takes it; (n, …) with p numbers per sample is flattened from dimension 1, so
    images can be fed as they are. uint8 input is pixels and is read as x/255. Output (…, k) or (n, k).

    Attributes:
        info: what `head.json` holds (class names, loss, input, metrics); empty for a head made by hand.

    Raises:
        ValueError: sizes below 1, an unknown init, input whose width does not fit.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        init: Init = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            if size < 1:
                raise ValueError(f"{name} is at least 1, got {size}")
        if init not in ("zeros", "normal", "linear"):
            raise ValueError(f"init is 'zeros', 'normal' or 'linear', got {init!r}")
        self.init: Init = init
        super().__init__(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.info: dict[str, Any] = {}
        self.holds_bias = False

    @property
    def num_classes(self) -> int:
        return self.out_features

    def reset_parameters(self) -> None:
        if self.init == "linear":
            super().reset_parameters()
            return
        with torch.no_grad():
            self.weight.zero_() if self.init == "zeros" else self.weight.normal_(std=0.01)
            if self.bias is not None:
                self.bias.zero_()

    def penalized(self, like_weight: Tensor) -> Tensor:
        """The part of a tensor shaped like `weight` that a penalty may touch, as a view: never a bias."""
        return like_weight[:, :-1] if self.holds_bias else like_weight

    def features(self, x: Tensor) -> Tensor:
        """Input as the rows the head multiplies: pixels divided by 255, samples flattened where needed."""
        rows = self._rows(x)
        return rows.to(self.weight.dtype) / 255 if x.dtype == torch.uint8 else rows

    def _rows(self, x: Tensor) -> Tensor:
        if x.dim() > 0 and x.shape[-1] == self.in_features:
            return x
        if x.dim() > 1 and math.prod(x.shape[1:]) == self.in_features:
            return x.flatten(1)
        raise ValueError(
            f"the head has in_features={self.in_features}, which fits neither the last dimension of the input "
            f"{tuple(x.shape)} nor the {math.prod(x.shape[1:])} numbers of each sample"
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            # Dividing the weights by 255 costs less than dividing the pixels, which are many more.
            return F.linear(self._rows(x).to(self.weight.dtype), self.weight / 255, self.bias)
        return F.linear(self._rows(x), self.weight, self.bias)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class index of each sample: the largest score, or z > 0 for a head with a single score."""
        return self.decide(self(x))

    def decide(self, scores: Tensor) -> Tensor:
        """The class index that scores (…, k) speak for: the largest, or z > 0 for a single score."""
        return (scores[..., 0] > 0).long() if self.out_features == 1 else scores.argmax(-1)

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Class probabilities, (n, num_classes), by the loss that `info` names.

        Raises:
            TypeError: the loss is not known, or defines no probabilities (the hinge family).
        """
        return self.probabilities(self(x))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Class probabilities (n, num_classes) of scores that this head gave; raises as `predict_proba`."""
        if "loss" not in self.info:
            raise TypeError(
                "this head does not know the loss it was trained with (head.info has no 'loss'): "
                "use loss.probabilities(scores), for example SoftmaxLoss().probabilities(head(x))"
            )
        return LOSS_REGISTRY.make(self.info["loss"]).probabilities(scores)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.out_features}, bias={self.bias is not None}"


class StandardizedHead(LinearHead):
    """A head whose parameters live in standardised coordinates x̃ = (x − μ)/σ and whose input is raw.

    The scores W̃x̃ + b̃ are computed as (W̃/σ) x + (b̃ − (W̃/σ) μ): the standardisation is folded into the weights at
    every step and never applied to the data, whose gradient reaches W̃ through the fold. `fold` hands out the raw head.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, init: Init = "zeros") -> None:
        super().__init__(in_features, num_classes, bias, init)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))

    @torch.no_grad()
    def restandardize(self, standardization: Standardization) -> None:
        """Move the parameters to other coordinates; the scores of every input stay what they are."""
        mean, std = (t.to(self.mean) for t in standardization)
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise ValueError(
                f"standardization of {tuple(mean.shape)} features for a head with in_features={self.in_features}"
            )
        if self.bias is None and bool((mean != 0).any()):
            raise ValueError("centring needs a bias: use bias=True, or a standardization with mean 0")
        raw = self.weight / self.std
        if self.bias is not None:
            self.bias.add_(raw @ (mean - self.mean))
        self.weight.copy_(raw * std)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) on raw input, differentiable in (W̃, b̃)."""
        weight = self.weight / self.std
        return weight, None if self.bias is None else torch.addmv(self.bias, weight, self.mean, alpha=-1)

    def coordinates(self, x: Tensor, half: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows r as they are multiplied, (n, p), and the m and s (p,) for which x̃ = (r − m)/s.

        Pixels are not divided by 255: m and s are multiplied, which are fewer. With `half`, the precision of autocast,
        they are v − 128 in that: exact for a pixel v, and near enough to 0 on average that a product has no large
        common part to lose digits to. Other features may be far from 0 compared with their differences, and stay in
        full precision.
        """
        rows = self._rows(x)
        if x.dtype != torch.uint8:
            return rows.to(self.weight.dtype), self.mean, self.std
        if half is not None and self.bias is not None:
            return rows.to(half) - 128, self.mean * 255 - 128, self.std * 255
        return rows.to(self.weight.dtype), self.mean * 255, self.std * 255

    def forward(self, x: Tensor) -> Tensor:
        rows, mean, std = self.coordinates(x, half_precision(x.device.type))
        with without_autocast(x.device.type):
            if self.bias is None:
                return F.linear(rows, self.weight / std)
            return folded_scores(rows, self.weight, self.bias, mean, std)

    @torch.no_grad()
    def fold(self) -> LinearHead:
        """A plain `LinearHead` on raw input with the same scores."""
        with without_autocast(self.weight.device.type):
            weight, bias = self.folded()
        head = LinearHead(
            self.in_features, self.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
        head.info = dict(self.info)
        return head


def folded_scores(rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """W̃x̃ + b̃ for x̃ = (r − m)/s, (n, k), from rows r (n, p), in the precision of the rows."""
    # Rounded first, if it is rounded: the bias is then that of the rounded weight, and nothing else is lost.
    raw = (weight / std).to(rows.dtype)
    bias = torch.addmv(bias, raw.to(bias.dtype), mean, alpha=-1)
    if rows.dtype != bias.dtype:
        return F.linear(rows, raw).to(bias.dtype) + bias
    # A graph must not depend on how many rows there are.
    few = not torch.compiler.is_compiling() and rows.dim() == 2 and len(rows) <= _FEW_ROWS
    if few and rows.device.type == "cpu":
        return torch.addmm(bias.unsqueeze(1), raw, rows.t()).t().contiguous()
    return F.linear(rows, raw, bias)


def half_precision(device_type: str) -> torch.dtype | None:
    """The precision of autocast on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products in the precision of their operands. Nothing where autocast is off: its context costs 20 µs."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


# The bias trick.


@torch.no_grad()
def absorb_bias(head: LinearHead) -> LinearHead:
    """W' = [W b], (k, p + 1): a head without a bias, for samples that end in a 1 (`append_one`). Same scores.

    A penalty still leaves the last column alone.
    """
    if head.bias is None:
        raise ValueError("the head has no bias to absorb")
    if isinstance(head, StandardizedHead):
        head = head.fold()
    k, p = head.weight.shape
    absorbed = LinearHead(p + 1, k, bias=False, device=head.weight.device, dtype=head.weight.dtype)
    absorbed.weight.copy_(torch.cat((head.weight, head.bias.unsqueeze(1)), 1))
    absorbed.holds_bias = True
    absorbed.info = dict(head.info)
    return absorbed


@torch.no_grad()
def split_bias(head: LinearHead) -> LinearHead:
    """The inverse of `absorb_bias`: the last column of W' becomes b again."""
    if not head.holds_bias:
        raise ValueError("the head's weight holds no bias: split_bias is for what absorb_bias returned")
    k, p = head.weight.shape
    split = LinearHead(p - 1, k, device=head.weight.device, dtype=head.weight.dtype)
    split.weight.copy_(head.weight[:, :-1])
    split.bias.copy_(head.weight[:, -1])
    split.info = dict(head.info)
    return split


def append_one(x: Tensor) -> Tensor:
    """[X 1]: every sample (…, p) gains a last feature 1."""
    return torch.cat((x, x.new_ones((*x.shape[:-1], 1))), -1)
