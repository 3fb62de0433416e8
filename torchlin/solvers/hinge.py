"""Piecewise linear losses (Weston–Watkins, Crammer–Singer) × L2, by the method of multipliers with smooth steps.

L(z) = max_{q ∈ Q} Σ_j q_j m_j with m_j = d_j + Δ, and Q a box or a simplex. Around a centre q⁰ it is replaced by

    L_μ(z) = max_{q ∈ Q} Σ q_j m_j − (μ/2) ‖q − q⁰‖²,    q* = P_Q(q⁰ + m/μ),   ∂L_μ/∂z = the g of q*,

which is smooth and goes to the preconditioned L-BFGS of the smooth losses. q* is dual-feasible for L itself, so every
point carries a certificate for the true problem. When the smooth problem is solved well enough, the centre moves to q*:
the proximal point method on the dual, equal to the method of multipliers on the primal; it converges for any fixed μ.

Reference: Rockafellar, Math. Oper. Res. 1 (1976); smoothing: Nesterov, Math. Programming 103 (2005).
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, runtime_checkable

from torch import Tensor

from torchlin.solvers.bundle import Bundle
from torchlin.solvers.precondition import Preconditioners
from torchlin.solvers.problem import DataTerm
from torchlin.solvers.smooth import MEMORY, Pairs, lbfgs
from torchlin.solvers.state import Point, Run

# Over which share of the margin corners are rounded at first; that share of the share at every move of the centre; and
# where it stays.
_WIDEST, _SHRINK, _LEAST = 1.0, 0.5, 0.25
# A centre that was reached in fewer passes is moved further the next time.
_SHORT = 5.0
# Corners rounded over less than this share of the margin are sharp for float64.
_NARROWEST = 1e-5


@runtime_checkable
class RivalProjection(Protocol):
    margin: float

    def project_rivals(self, rivals: Tensor) -> Tensor: ...


class SmoothedTerm(DataTerm):
    """The data term of L_μ around a centre (n, k), None for 0."""

    def __init__(self, data: DataTerm, loss: RivalProjection, width: float, centre: Tensor | None) -> None:
        self.__dict__.update(vars(data))
        self.width, self.centre, self.hinge = width, centre, loss

    def rivals(self, scores: Tensor) -> Tensor:
        """q*, (n, k) with 0 in column y."""
        # Column y of the gradient is −Σ q.
        return self.evaluate(scores).gradient.scatter(1, self.target.unsqueeze(1), 0)

    def rows(self, scores: Tensor, block: slice | Tensor) -> tuple[Tensor, Tensor]:
        own = self.target[block].unsqueeze(1)
        m = scores - scores.gather(1, own)
        m.add_(self.hinge.margin)
        q = m / self.width
        if self.centre is not None:
            q += self.centre[block]
        q.scatter_(1, own, -float("inf"))
        q = self.hinge.project_rivals(q)
        # ⟨q, m⟩ − (μ/2)‖q − q⁰‖²; what column y of m holds meets a zero.
        moved = q if self.centre is None else q - self.centre[block]
        values = m.mul_(q).sum(1).sub_(moved.square().sum(1), alpha=self.width / 2)
        return values, q.scatter_(1, own, -q.sum(1, keepdim=True))


def round_corners(run: Run) -> None:
    """Put the smoothed data term, with the widest corners around the centre 0, in place of the piecewise linear one."""
    penalty, loss = run.penalty, run.data.loss
    assert penalty is not None
    assert isinstance(loss, RivalProjection)
    run.bundle, run.best = Bundle(penalty.l2), None
    _set(run, SmoothedTerm(run.data, loss, _WIDEST * loss.margin, None))


def multipliers(run: Run, point: Point, gram: Tensor | None) -> Point:
    """Minimise F for a piecewise linear loss and L2 until the certified gap is at most `run.tol`.

    Returns the best point met. The lower bound is the best convex combination of the dual points met. Every move of the
    centre makes the corners narrower, down to `_LEAST`; what L-BFGS learned about the curvature is kept from one centre
    to the next once they stay.

    Args:
        run: after `round_corners`.
        point: where to start.
        gram: X̃ᵀX̃/N, (p, p), or None.
    """
    precondition = Preconditioners(run, gram)
    pairs: Pairs = deque(maxlen=MEMORY)
    while True:
        smoothed = run.smoothed
        assert isinstance(smoothed, SmoothedTerm)
        # Few rivals may stand in the rounded corners now; on the way to the minimiser more will.
        run.least_curvature = 0.05 / smoothed.width
        begun = run.passes
        point = lbfgs(run, point, precondition, pairs)
        if point.certificate.gap <= run.tol or run.spent:
            return run.best or point
        margin = smoothed.hinge.margin
        share = smoothed.width / margin
        if share > _LEAST or (run.passes - begun < _SHORT and share > _NARROWEST):
            # A short stage could have taken a longer step.
            pairs.clear()
            share *= _SHRINK
        _set(run, SmoothedTerm(run.data, smoothed.hinge, share * margin, smoothed.rivals(point.scores)))
        point = run.point(point.weight, point.raw)


def _set(run: Run, smoothed: SmoothedTerm) -> None:
    run.smoothed = smoothed
    run.bias = run.bias.of(smoothed)
