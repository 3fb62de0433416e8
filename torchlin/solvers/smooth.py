"""Preconditioned L-BFGS for smooth objectives: softmax, logistic, squared hinge × none or L2."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from torchlin.solvers.precondition import Preconditioner, Preconditioners
from torchlin.solvers.state import Point, Run

Pairs = deque[tuple[Tensor, Tensor, float]]
MEMORY = 30
# A step this short this far from the minimum is no progress.
_SHORT_STEP, _FAR = 0.01, 0.1


def lbfgs(run: Run, point: Point, precondition: Preconditioners, pairs: Pairs | None = None) -> Point:
    """Minimise F over W, the bias being solved at every point, until the certified gap is at most `run.tol`.

        d = −H ∇F,  H from the last pairs (s, y) around H₀ = `precondition(W)`   (two-loop recursion)

    H₀ is built again for the present point at every step where it is the exact Hessian (pairs are then left out: this
    is Newton's method), and otherwise where the gap did not fall tenfold in four steps.

    Scores are linear in W: once X̃dᵀ is known, a step length costs no pass over the data. A pass is spent on the
    direction's scores and on the gradient at the point the line search chose.

    Reference: Nocedal & Wright, Numerical Optimization (2006), algorithm 7.4.
    """
    ridge = 0.0 if run.penalty is None else 2 * run.penalty.l2
    pairs = deque(maxlen=MEMORY) if pairs is None else pairs
    gradient = point.v + ridge * point.weight
    # One number added to all scores of a sample changes nothing then, so that W has a free direction, along which
    # rounding alone would lead. L2 has its minimum on it at Σ_j w_j = 0.
    free = run.data.outputs > 1 and float(point.gradient.sum(1).abs().max()) < 1e-9
    inverse, mark, age = None, point.certificate.gap, 0
    while not run.done(point):
        if precondition.exact:
            pairs.clear()
            inverse = precondition(point)
        elif inverse is None or age >= 4:
            if inverse is None or point.certificate.gap > 0.1 * mark:
                inverse = precondition(point)
            mark, age = point.certificate.gap, 0
        age += 1
        direction = _two_loop(gradient, pairs, inverse)
        if not float((direction * gradient).sum()) < 0:
            pairs.clear()
            direction = -inverse(gradient)
        if free:
            direction = direction - direction.mean(0)
        change = run.scores(direction)
        # Along the line the bias goes with the scores, or Newton's step would look too long; to first order, unless
        # that carries no further than a corner of the loss.
        answer = run.bias.response(point.scores, change, exact=precondition.exact)
        step = _line_search(run, point, direction, change, answer, ridge)
        if step < _SHORT_STEP and precondition.exact and point.certificate.gap > _FAR:
            answer = torch.zeros_like(answer)
            step = _line_search(run, point, direction, change, None, ridge)
        if step == 0:
            if not pairs:
                break  # rounding leaves no descent
            pairs.clear()
            continue
        run.moved = step * float((change + answer).abs().max())
        weight = point.weight + step * direction
        raw = torch.add(point.raw, change, alpha=step)
        run.bias.value = run.bias.value + step * answer
        moved = run.point(weight, raw)
        moved_gradient = moved.v + ridge * weight
        s, y = step * direction, moved_gradient - gradient
        sy = float((s * y).sum())
        if sy > 1e-14 * float(s.norm() * y.norm()):
            pairs.append((s, y, sy))
        point, gradient = moved, moved_gradient
    return point


def _two_loop(gradient: Tensor, pairs: Pairs, inverse: Preconditioner) -> Tensor:
    q = gradient.clone()
    factors = []
    for s, y, sy in reversed(pairs):
        a = float((s * q).sum()) / sy
        factors.append(a)
        q.sub_(y, alpha=a)
    q = inverse(q)
    for (s, y, sy), a in zip(pairs, reversed(factors), strict=True):
        q.add_(s, alpha=a - float((y * q).sum()) / sy)
    return q.neg_()


def _line_search(
    run: Run, point: Point, direction: Tensor, change: Tensor, answer: Tensor | None, ridge: float
) -> float:
    """A step at which the slope along the direction is small: |φ'(t)| ≤ ¼ |φ'(0)|, by safeguarded secants on φ'.

    Args:
        answer: how the bias moves along the line; None solves it at every trial.
    """
    cross, square = float((point.weight * direction).sum()), float(direction.square().sum())
    moves = change if answer is None else change + answer

    def slope(t: float) -> float:
        if answer is None:
            at = run.bias.solve(torch.add(point.raw, change, alpha=t))
            of_data = run.term.slope(at.gradient, change)
        else:
            of_data = run.term.along(point.scores, moves, t)[1]
        return of_data + ridge * (cross + t * square)

    first = float((point.v * direction).sum()) + ridge * cross
    if not first < 0:
        return 0.0
    low, low_slope, high, high_slope = 0.0, first, float("inf"), 0.0
    t = 1.0
    for _ in range(30):
        now = slope(t)
        if abs(now) <= 0.25 * -first:
            return t
        if now < 0:
            ahead = 4 * t if high == float("inf") else high
            secant = t - now * (t - low) / (now - low_slope) if now != low_slope else ahead
            low, low_slope = t, now
        else:
            ahead = low
            high, high_slope = t, now
            secant = low - low_slope * (high - low) / (high_slope - low_slope)
        if high == float("inf"):
            t = min(max(secant, 1.5 * t), ahead)
        else:
            t = min(max(secant, low + 0.05 * (high - low)), high - 0.05 * (high - low))
    return low
