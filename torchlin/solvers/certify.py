"""How far any head is from the optimum of its own objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchlin.features import FeatureMatrix
from torchlin.heads import LinearHead, Standardization, StandardizedHead, split_bias
from torchlin.losses import Loss
from torchlin.penalties import Penalty
from torchlin.solvers.certificate import Certificate, certificate
from torchlin.solvers.hinge import RivalProjection
from torchlin.solvers.problem import Bias, DataTerm
from torchlin.solvers.solve import _loss_of, _weights, solve


class MovedFeatures(FeatureMatrix):
    """Rows in coordinates (X − μ)/σ that were given instead of computed from them.

    With x̂ = (x − μ₀)/σ₀ what `features` multiplies, x̃ = a x̂ + c for a = σ₀/σ and c = (μ₀ − μ)/σ, so every product of
    X̃ follows from one of X̂.
    """

    def __init__(self, features: FeatureMatrix, standardization: Standardization) -> None:
        self.features, self.shape = features, features.shape
        self.dtype, self.device = features.dtype, features.device
        own = features.standardization
        to = Standardization(*(t.to(own.mean) for t in standardization))
        if to.mean.shape != own.mean.shape or to.std.shape != own.std.shape:
            raise ValueError(f"standardization of {len(to.mean)} features, but there are {self.shape[1]}")
        self.standardization = to
        self._scale, self._shift = own.std / to.std, (own.mean - to.mean) / to.std

    @property
    def numbers(self) -> int:
        return self.features.numbers

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = weight.to(self._scale)
        offset = weight @ self._shift
        return self.features.scores(weight * self._scale, offset if bias is None else bias.to(offset) + offset)

    def gradient(self, score_gradient: Tensor) -> Tensor:
        product = self.features.gradient(score_gradient)
        ones = product[:, -1:]
        return torch.cat((product[:, :-1] * self._scale.to(ones) + ones * self._shift.to(ones), ones), 1)

    def gram(self, weight: Tensor | None = None) -> Tensor:
        gram = self.features.gram(weight)
        ones = torch.ones(self.shape[0], dtype=torch.float64, device=self.device)
        sums = self.features.gradient((ones if weight is None else weight.to(ones)).unsqueeze(1))[0].to(gram)
        scale, shift = self._scale.to(gram), self._shift.to(gram)
        cross = torch.outer(scale * sums[:-1], shift)
        return gram * torch.outer(scale, scale) + cross + cross.T + sums[-1] * torch.outer(shift, shift)

    def rows(self, index: Tensor | slice) -> Tensor:
        rows = self.features.rows(index)
        return rows * self._scale.to(rows) + self._shift.to(rows)


def certify(
    head: LinearHead,
    features: Tensor | FeatureMatrix,
    target: Tensor,
    loss: Loss | str,
    penalty: Penalty | None,
    *,
    standardize: bool | Standardization = True,
    class_weight: Tensor | Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
    tol: float | None = None,
    max_passes: float = 1000,
    device: torch.device | str | None = None,
) -> Certificate:
    """F at a head, and a lower bound D of F everywhere: the head is at most F − D above the optimum, however trained.

        D = (1/N) Σ −s_i L*(g_i) − λR*(V),   g the score gradients at (W, b*),  b* the best bias for W,  V = GᵀX̃/N

    For a smooth loss that takes one pass. Under L2 it says F − D ≤ ‖∇F‖²/(4λ), which is far too pessimistic for a
    small λ; with a `tol` the solver looks for a better D. A hinge loss has no useful g at one point, so its D always
    comes from the solver.

    Args:
        head: acts on raw input. One without a bias is compared with the best head that has one.
        features: (n, p), (n, …) pixels or a `FeatureMatrix`: what the objective is averaged over. target: (n,).
        loss, penalty: the objective.
        standardize: the coordinates in which the penalty lives: those of the features (True), raw ones (False), or
            the μ and σ that the head was trained with. A `FeatureMatrix` brings its own.
        class_weight, sample_weight: as in `solve`.
        tol: the relative gap at which the solver stops, by default 0.01 for a hinge loss and no solver otherwise.
        max_passes: of the solver. A bound that it could not finish is still a bound.
        device: where to compute; by default where the features are.

    Returns:
        a `Certificate`. Its `measure` is "gradient" where λ = 0 (gap is ‖∇F‖), and "objective" where nothing better
        than F ≥ 0 is known (gap is then F): the perceptron loss, and hinge losses without L2 alone.

    Raises:
        ValueError: sizes that do not fit, labels out of range.
    """
    loss = _loss_of(loss, class_weight)
    head = _raw(head)
    weight = _weights(loss, target, sample_weight)
    own = standardize if isinstance(standardize, bool) else True
    x = FeatureMatrix.of(features, standardize=own, weight=weight, dtype=torch.float64, device=device)
    if not isinstance(standardize, bool):
        x = MovedFeatures(x, standardize)
    if head.in_features != x.shape[1]:
        raise ValueError(f"the head has in_features={head.in_features}, but there are {x.shape[1]} features")
    if len(target) != x.shape[0]:
        raise ValueError(f"features have {x.shape[0]} rows and target has {len(target)} entries")
    target = target.to(x.device)
    data = DataTerm(loss, target, head.out_features, sample_weight)
    mean, std = x.standardization
    raw_weight = head.weight.detach().to(mean)
    w = raw_weight * std
    b = raw_weight @ mean if head.bias is None else raw_weight @ mean + head.bias.detach().to(mean)
    scores = x.scores(w).double()
    primal = data.value(scores + b) + (0.0 if penalty is None else float(penalty.value(w)))
    at_zero = data.value(torch.zeros_like(scores))
    smooth = loss.smoothness(data.outputs) is not None
    if smooth:
        # D may be taken at any point: with the best bias for these weights nothing is charged for Σ g ≠ 0.
        bias = Bias(data, b)
        at = bias.solve(scores)
        v = x.gradient(data.weighted(at.gradient))[:, :-1].double()
        found = certificate(data, penalty, at, v, primal, at_zero, bias.value, at.value)
        if tol is None or found.measure != "gap" or found.gap <= tol:
            return found
    else:
        reason = _no_bound(loss, penalty)
        if reason:
            return Certificate(primal, 0.0, primal, float("inf"), "objective", reason)
        found = Certificate(primal, 0.0, 1.0, float("inf"))
    best = solve(
        x, target, loss, penalty, num_classes=loss.classes(head.out_features), tol=1e-2 if tol is None else tol,
        max_passes=max_passes, sample_weight=sample_weight, on_failure="return",
    ).certificate  # fmt: skip
    if best.dual > found.dual:
        found = replace(found, dual=best.dual, bias_bound=best.bias_bound)
    return replace(found, gap=(primal - found.dual) / max(primal, 1e-3 * at_zero))


def _raw(head: LinearHead) -> LinearHead:
    if isinstance(head, StandardizedHead):
        head = head.fold()
    return split_bias(head) if head.holds_bias else head


def _no_bound(loss: Loss, penalty: Penalty | None) -> str:
    """Why there is no lower bound better than 0 for a loss that is not smooth; empty where there is one."""
    if not isinstance(loss, RivalProjection):
        return f"W = 0 is a global minimiser of the {loss.name} loss: gap is F itself"
    if penalty is None or penalty.l1 > 0 or penalty.l2 == 0:
        return f"the {loss.name} loss has a useful dual bound under L2 only: gap is F itself"
    return ""
