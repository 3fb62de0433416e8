"""Where a full-batch solver stands: a point, its gradient and its certificate, for one pass over the data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchlin.features import FeatureMatrix
from torchlin.penalties import Penalty
from torchlin.solvers.bundle import Bundle
from torchlin.solvers.certificate import Certificate, bias_bound, certificate
from torchlin.solvers.problem import Bias, DataTerm


class Progress(NamedTuple):
    """One line of a solver's history."""

    passes: float
    seconds: float
    objective: float
    gap: float


@dataclass
class Point:
    """W (k, p) in standardised coordinates, with everything that one pass over the data tells about it.

    `raw` are the scores without the bias, `scores` those with it; `gradient` (n, k) is unweighted; `v` = GᵀX̃/N.
    """

    weight: Tensor
    raw: Tensor
    scores: Tensor
    gradient: Tensor
    v: Tensor
    value: float
    primal: float
    certificate: Certificate
    bias: Tensor


@dataclass
class Run:
    """What all full-batch methods share: the problem, the counts and the history.

    One pass is one product of X̃ with weights and one with score gradients.
    """

    features: FeatureMatrix
    data: DataTerm
    penalty: Penalty | None
    tol: float
    max_passes: float
    bias: Bias
    report: Callable[[Progress], None] | None = None
    passes: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    history: list[Progress] = field(default_factory=list)
    at_zero: float = 0.0
    inner: float = 0.3
    bound: float = -math.inf
    least_curvature: float = 1e-6
    bundle: Bundle | None = None
    moved: float = 0.0  # the largest change of a score at the last step
    best: Point | None = None  # that with the smallest F
    smoothed: DataTerm | None = None  # what is minimised in place of `data`, whose certificate counts

    @property
    def term(self) -> DataTerm:
        """The differentiable data term that steps are computed for."""
        return self.data if self.smoothed is None else self.smoothed

    def scores(self, weight: Tensor) -> Tensor:
        self.passes += 0.5
        return self.features.scores(weight).double()

    def point(self, weight: Tensor, raw: Tensor) -> Point:
        """The point W whose scores without bias are `raw`: the bias is solved, the gradient and the gap computed."""
        at = self.bias.solve(raw)
        # What is left of Σ g must not be what keeps the gap from `tol`.
        unit = max(at.value, 1e-3 * self.at_zero)
        while bias_bound(self.bias.value) * float(at.residual.abs().sum()) > 0.01 * self.tol * unit:
            if self.bias.tol <= 1e-15:
                break
            self.bias.tol /= 100
            at = self.bias.solve(raw)
        scores, value, gradient, _ = at
        if self.smoothed is not None:
            value = self.data.value(scores)
        self.passes += 0.5
        v = self.features.gradient(self.data.weighted(gradient))[:, :-1].double()
        primal = value if self.penalty is None else value + float(self.penalty.value(weight))
        found = certificate(
            self.data, self.penalty, at, v, primal, self.at_zero, self.bias.value, value,
            exact=self.smoothed is None,
        )  # fmt: skip
        if self.bundle is not None and self.penalty is not None:
            rest = found.dual + float(v.square().sum()) / (4 * self.penalty.l2)
            found = replace(found, dual=max(found.dual, self.bundle.add(rest, v)))
        found = self._with_best_bound(found)
        point = Point(weight, raw, scores, gradient, v, value, primal, found, self.bias.value)
        if self.smoothed is None:
            pass  # the last is the best, and another would take memory
        elif self.best is None or primal < self.best.primal:
            self.best = point
        else:
            found = self._with_best_bound(replace(found, primal=self.best.primal))
            point.certificate = found
        progress = Progress(self.passes, time.perf_counter() - self.started, found.primal, found.gap)
        self.history.append(progress)
        if self.report is not None:
            self.report(progress)
        return point

    def _with_best_bound(self, found: Certificate) -> Certificate:
        """A lower bound of F stays one: the best of all points counts."""
        if found.measure != "gap":
            return found
        self.bound = max(self.bound, found.dual)
        gap = (found.primal - self.bound) / max(found.primal, 1e-3 * self.at_zero)
        return replace(found, dual=self.bound, gap=gap)

    def start(self, weight: Tensor | None) -> Point:
        """The first point: W = 0, which needs no product for its scores, or a warm start."""
        n, p = self.features.shape
        zero = torch.zeros(self.data.outputs, n, dtype=torch.float64, device=self.features.device).T
        self.at_zero = self.data.value(zero)
        if weight is None:
            return self.point(zero.new_zeros(self.data.outputs, p), zero)
        return self.fresh(weight)

    def fresh(self, weight: Tensor) -> Point:
        """The point W with scores that were not added up step by step."""
        return self.point(weight, self.scores(weight))

    def confirm(self, point: Point) -> Point:
        """The point with scores that were not added up step by step, and certified by them."""
        if self.smoothed is None:
            return self.fresh(point.weight)
        self.bias.value = point.bias
        value = self.data.value(self.scores(point.weight) + point.bias)
        primal = value if self.penalty is None else value + float(self.penalty.value(point.weight))
        certificate = self._with_best_bound(replace(point.certificate, primal=primal))
        return replace(point, value=value, primal=primal, certificate=certificate)

    @property
    def spent(self) -> bool:
        """Whether another step would go beyond `max_passes`, one pass being kept for the last certificate."""
        return self.passes + 2 > self.max_passes

    def stage_done(self, point: Point) -> bool:
        """Whether the smoothed problem is solved well enough: its own gap is small against the certified one."""
        if self.smoothed is None or self.penalty is None:
            return False
        gradient = point.v + 2 * self.penalty.l2 * point.weight
        own = float(gradient.square().sum()) / (4 * self.penalty.l2) / max(point.primal, 1e-3 * self.at_zero)
        return own <= self.inner * point.certificate.gap

    def done(self, point: Point) -> bool:
        return point.certificate.gap <= self.tol or self.stage_done(point) or self.spent
