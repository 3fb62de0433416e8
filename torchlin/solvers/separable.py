"""λ = 0 on data that a linear classifier can separate: where no minimiser exists, and where F = 0 is one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from torchlin.losses import Loss, SquaredHingeLoss
from torchlin.penalties import L2
from torchlin.solvers.certificate import Certificate
from torchlin.solvers.problem import DataTerm
from torchlin.solvers.state import Point, Run

# Strengths at which a separating W is looked for, one after the other.
_STRENGTHS = (1e-3, 1e-5, 1e-7, 1e-9)
# Scores still move by this much at a step although the gradient is below `_FLAT`: they move for ever.
_MOVES, _FLAT = 0.05, 1e-7


def run_unless_separable(run: Run, point: Point, method: Callable[[Run, Point], Point]) -> Point:
    """method(run, point), unless F has no minimiser: softmax or logistic loss without penalty on separable data.

    If some W puts every sample on the right side, or none on the wrong one and some on the right one
    (quasi-separation), scaling it up lowers F for ever. The first is seen from the predictions. The second shows in
    steps that do not become shorter: there F falls like e^(−t), whose Newton step is 1 wherever one stands.

    Raises:
        ValueError: the data are separable or quasi-separable.
    """
    loss = run.data.loss
    if run.penalty is not None and (run.penalty.l1 > 0 or run.penalty.l2 > 0):
        return method(run, point)
    if type(loss).probabilities is Loss.probabilities or run.data.target.dim() > 1:
        return method(run, point)
    tol = run.tol
    run.tol = max(tol, _FLAT)
    while True:
        point = method(run, point)
        if separation(run.data, point.scores) > 0:
            raise ValueError(_message(loss, "the classes are separable"))
        if run.moved <= _MOVES or run.spent or point.certificate.gap > run.tol:
            break
        if run.tol <= _FLAT:
            raise ValueError(_message(loss, "the classes are quasi-separable (part of the samples can be separated)"))
        run.tol = max(_FLAT, run.tol / 100)
    reached, run.tol = run.tol, tol
    return method(run, point) if tol < reached else point


def _message(loss: Loss, what: str) -> str:
    return (
        f"{what}: without a penalty the {loss.name} loss has no minimiser, it falls as the weights grow without end. "
        "Add a small penalty such as L2(1e-6)"
    )


def separation(data: DataTerm, scores: Tensor) -> float:
    """The smallest margin by which a sample that counts is on the right side: z_y − max z_j, or ±z for one score."""
    target = data.target
    if data.outputs == 1:
        margins = torch.where(target == 1, scores[:, 0], -scores[:, 0])
    else:
        own = target.unsqueeze(1)
        margins = (scores.gather(1, own) - scores.scatter(1, own, -torch.inf).amax(1, keepdim=True)).squeeze(1)
    return float((margins if data.coefficient is None else margins[data.coefficient > 0]).min())


def separate(run: Run, margin: float, solver: Callable[[Run, Point], Callable[[Run, Point], Point]]) -> Point:
    """A W at which a hinge loss without penalty is 0, its smallest possible value.

    The squared hinge loss with ever smaller L2 is solved until every sample is on the right side; the solution is then
    scaled until it is so by the margin.

    Args:
        margin: Δ.
        solver: the full-batch method for a smooth problem.

    Raises:
        ValueError: the samples were not separated.
    """
    data = copy.copy(run.data)
    data.loss = SquaredHingeLoss(margin=margin)
    weight: Tensor | None = None
    bias = type(run.bias)(data, tol=1e-9)
    for strength in _STRENGTHS:
        inner = Run(run.features, data, L2(strength), 1e-2, run.max_passes - run.passes, bias, started=run.started)
        point = inner.start(weight)
        if not inner.done(point):
            point = solver(inner, point)(inner, point)
        weight = point.weight
        run.passes += inner.passes
        least = separation(data, run.scores(weight) + bias.value)
        if least > 0:
            scale = (1 + 1e-9) * margin / least
            weight, run.bias.value = weight * scale, bias.value * scale
            scores = run.scores(weight) + run.bias.value
            value = run.data.value(scores)
            run.at_zero = run.data.value(torch.zeros_like(scores))
            found = Certificate(value, 0.0, value / max(value, 1e-3 * run.at_zero), 0.0)
            return Point(weight, scores, scores, scores, weight, value, value, found, run.bias.value)
        if run.spent:
            break
    raise ValueError(
        f"without a penalty the {run.data.loss.name} loss is solved only where the classes are separable (F = 0), and "
        f"they were not separated down to L2({strength:g}): give an L2 penalty"
    )
