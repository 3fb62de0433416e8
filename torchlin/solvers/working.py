"""Many features, few of them used: an L1 penalty solved on a working set, until the others prove unneeded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchlin.features import DenseFeatures
from torchlin.solvers.state import Point, Run

# Features of the first working set.
_FIRST = 250
# How exactly the problem of a working set is solved: this share of the present gap, and of `tol`.
_SHARE, _LAST = 0.1, 0.3


def working_set(run: Run, point: Point, solver: Callable[[Run, Point], Callable[[Run, Point], Point]]) -> Point:
    """Minimise F over W for a penalty with an L1 part until the certified gap is at most `run.tol`.

    At the minimiser |V_j| ≤ λα for every weight that is zero, so the features that are used, and those with the largest
    |V_j|, are tried first. Their problem is solved, one pass over all features tells what they would gain (the gap is
    certified there, all features considered), and the next set holds all that would. A pass over a part of the features
    counts as that part.

    Args:
        solver: the method for the problem of a working set.

    Reference: Johnson & Guestrin, ICML 2015 (Blitz); Massias, Gramfort & Salmon, ICML 2018 (celer).
    """
    penalty = run.penalty
    assert penalty is not None
    p, before = run.features.shape[1], torch.inf
    while not run.done(point) and point.certificate.gap < before:
        before = point.certificate.gap
        used = (point.weight != 0).any(0)
        merit = torch.where(used, torch.inf, point.v.abs().amax(0))
        count, wanted = int(used.sum()), int((merit > penalty.l1).sum())
        size = min(p, max(_FIRST, 2 * count, wanted if count else 0))
        chosen = merit.topk(size).indices.sort().values
        part = DenseFeatures(run.features.columns(chosen).double(), False, None, torch.float64, run.features.device)
        tol = max(_LAST * run.tol, _SHARE * min(1.0, point.certificate.gap))
        inner = Run(part, run.data, penalty, tol, run.max_passes - run.passes, run.bias, started=run.started)
        at = inner.start(point.weight[:, chosen])
        if not inner.done(at):
            at = solver(inner, at)(inner, at)
        run.passes += inner.passes * size / p
        weight = torch.zeros_like(point.weight)
        weight[:, chosen] = at.weight
        point = run.fresh(weight)
    return point
