"""`solve`: from features, targets, a loss and a penalty to a certified minimiser."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from torchlin.features import DenseFeatures, FeatureMatrix
from torchlin.losses import LOSS_REGISTRY, Loss
from torchlin.machine import available_memory, on_threads
from torchlin.penalties import Penalty
from torchlin.solvers.hinge import RivalProjection, multipliers, round_corners
from torchlin.solvers.precondition import Preconditioners
from torchlin.solvers.problem import Bias, DataTerm, NoBias
from torchlin.solvers.proximal import accelerated, proximal_newton
from torchlin.solvers.separable import run_unless_separable, separate
from torchlin.solvers.smooth import lbfgs
from torchlin.solvers.solution import NotConvergedError, Solution
from torchlin.solvers.state import Point, Progress, Run
from torchlin.solvers.working import working_set

Method = Callable[[Run, Point], Point]

# More features than these are not all looked at under an L1 penalty, which uses few of them.
_MANY = 4096
# A Gram matrix that costs as much as so many passes is left out: that of sparse features, mostly.
_DEAR = 5000


def solve(
    features: Tensor | FeatureMatrix,
    target: Tensor,
    loss: Loss | str = "softmax",
    penalty: Penalty | None = None,
    *,
    num_classes: int | None = None,
    tol: float = 1e-4,
    max_passes: float = 1000,
    standardize: bool = True,
    bias: bool = True,
    class_weight: Tensor | Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
    warm_start: Solution | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_failure: Literal["raise", "return"] = "raise",
    report: Callable[[Progress], None] | None = None,
) -> Solution:
    """Minimise F(W, b) = (1/N) Σ s_i L_i + λR(W) until a dual bound proves that (F − F*)/max(F, 10⁻³F(0)) ≤ tol.

    Smooth losses × none or L2: L-BFGS preconditioned by the Gram matrix. Smooth losses with an L1 part: proximal
    Newton, on a growing set of features where there are many. Hinge and Crammer–Singer × L2: the method of multipliers.
    Where p > n (and there is no L1 part) everything happens in the span of the samples.

    Args:
        features: (n, p), see `FeatureMatrix.of`; or a `FeatureMatrix`, which keeps its standardisation.
        target: (n,) class indices.
        loss: a loss or its name. penalty: `L2`, `L1`, `ElasticNet` or None.
        num_classes: by default the largest index and 1. A class without a sample is an error: its bias has no minimum.
        tol: the relative gap to reach. Where λ = 0 there is no dual bound, and it is ‖∇F‖ (see `Certificate.measure`).
        max_passes: what may be spent on it; the Gram matrix does not count.
        standardize, dtype, device: see `FeatureMatrix.of`. Where float32 cannot certify `tol` and no dtype is asked
            for, float64 is used.
        bias: False leaves it out. Features are then not centred: `standardize=False`.
        class_weight, sample_weight: s_i is their product, and N = Σ s_i.
        warm_start: a solution for the same features.
        on_failure: "raise", or "return" what was reached with `converged=False`.
        report: called after every pass.

    Raises:
        NotConvergedError: the tolerance was not met; the error holds what was reached.
        TypeError: the perceptron loss; a hinge loss with an L1 part; labels that are not integers.
        ValueError: labels out of range, a class that never occurs, bad features, tol ≤ 0; without penalty, softmax or
            logistic loss on separable data, which has no minimiser, and a hinge loss on data that are not separable; a
            bias left out of centred features.
    """
    started = time.perf_counter()
    if not tol > 0:
        raise ValueError(f"tol is a positive number, got {tol}")
    loss = _loss_of(loss, class_weight)
    _check(loss, penalty)
    weight = _weights(loss, target, sample_weight)
    x = FeatureMatrix.of(features, standardize=standardize, weight=weight, dtype=dtype, device=device)
    if len(target) != x.shape[0]:
        raise ValueError(f"features have {x.shape[0]} rows and target has {len(target)} entries")
    outputs = loss.outputs(_classes(loss, target.to(x.device), num_classes))
    data = DataTerm(loss, target.to(x.device), outputs, sample_weight)
    # What is left of Σ g is charged to the bound.
    if not bias and bool(x.standardization.mean.any()):
        raise ValueError("features are centred by the bias, and bias=False leaves it out: give standardize=False too")
    left = min(max(1e-4 * tol / outputs, 1e-14), 1e-8)
    solved = Bias(data, tol=left) if bias else NoBias(data)
    run = Run(x, data, penalty, tol, max_passes, solved, report, started=started)
    with _same_for_any_threads(x):
        point = _solve(run, weight, warm_start)
        if x.dtype == torch.float32 and math.isfinite(point.certificate.dual):
            # What float32 products leave of the gradient may be more than tol: the proof is of float64 ones.
            run.features, run.bound, run.bundle, run.best = x.double(), -math.inf, None, None
            point = run.fresh(point.weight)
            if point.certificate.gap > tol and dtype is None:
                point = _solve(run, weight, point.weight)
        return _finish(run, point, on_failure, dtype)


@contextlib.contextmanager
def _same_for_any_threads(x: FeatureMatrix) -> Iterator[None]:
    """One thread for all floating-point sums; products that are exact keep the others."""
    if not x.exact or x.device.type != "cpu":
        yield
        return
    before = x.threads
    x.threads = before or torch.get_num_threads()
    try:
        with on_threads(1):
            yield
    finally:
        x.threads = before


def _solve(run: Run, weight: Tensor | None, warm_start: Solution | Tensor | None) -> Point:
    warm = warm_start if isinstance(warm_start, Tensor) else None
    if isinstance(warm_start, Solution):
        mean, std = run.features.standardization
        warm = warm_start.weight.to(mean) * std
        run.bias.start(warm_start.bias.to(mean) + warm_start.weight.to(mean) @ mean)
    if not _penalised(run.penalty) and isinstance(run.data.loss, RivalProjection) and _has_corners(run.data.loss):
        return separate(run, run.data.loss.margin, lambda run, point: _method(run, point, weight))
    if _has_corners(run.data.loss):
        round_corners(run)
    point = run.start(warm)
    method: Method | None = None
    for _ in range(3):
        if point.certificate.gap <= run.tol or run.spent:
            break
        method = method or _method(run, point, weight)
        # What is handed out is certified on fresh scores; should they say otherwise, it goes on from there.
        point = run.confirm(run_unless_separable(run, point, method))
    return point


def _method(run: Run, point: Point, weight: Tensor | None) -> Method:
    """The algorithm for this loss, penalty and shape, with what it computes once."""
    n, p = run.features.shape
    l1 = 0.0 if run.penalty is None else run.penalty.l1
    # A square matrix, its factor and one more in float64 are to take half of what is free.
    free = available_memory(run.features.device)
    if l1 == 0 and p > n and 48 * n * n <= free:
        return _in_span(run, weight)
    if l1 > 0 and p > _MANY:
        return lambda run, point: working_set(run, point, lambda inner, at: _direct(inner, at, weight))
    return _direct(run, point, weight)


def _direct(run: Run, point: Point, weight: Tensor | None) -> Method:
    """The algorithm in the space of all features, with their Gram matrix where that can be had."""
    n, p = run.features.shape
    l1 = 0.0 if run.penalty is None else run.penalty.l1
    smooth = run.data.loss.smoothness(run.data.outputs) is not None
    free = available_memory(run.features.device)
    # Multiplications for it and its factor, in units of those of a pass.
    dear = (n + p) * p * p > _DEAR * 4 * run.features.numbers * run.data.outputs
    if dear or 48 * p * p > free:
        if not dear:
            warnings.warn(
                f"X̃ᵀX̃ is ({p}, {p}) and would take {24 * p * p / 2**30:.1f} GiB with its factors, but "
                f"{free / 2**30:.1f} GiB are free: solving without it, which takes more passes",
                stacklevel=5,
            )
        if not smooth:
            return lambda run, point: multipliers(run, point, None)
        if l1 > 0:
            return accelerated
        precondition = Preconditioners(run, None)
        return lambda run, point: lbfgs(run, point, precondition)
    gram = run.features.gram(weight).double() / run.data.total
    return _with_gram(run, point, gram)


def _with_gram(run: Run, point: Point, gram: Tensor) -> Method:
    l1 = 0.0 if run.penalty is None else run.penalty.l1
    if run.data.loss.smoothness(run.data.outputs) is None:
        return lambda run, point: multipliers(run, point, gram)
    if l1 > 0:
        curvature = max(run.data.mean_curvature(point.scores, point.gradient), 1e-6)
        return lambda run, point: proximal_newton(run, point, gram, curvature)
    precondition = Preconditioners(run, gram)
    return lambda run, point: lbfgs(run, point, precondition)


def _in_span(run: Run, weight: Tensor | None) -> Method:
    """p > n: with X̃X̃ᵀ = QΛQᵀ the rows of W are combinations of samples, W = W_r Λ^(−½) Qᵀ X̃, and X̃ may be replaced
    by QΛ^½, (n, r): same scores, same norm of the weights."""
    full = run.features
    values, vectors = torch.linalg.eigh(full.kernel().double())
    kept = values > 1e-12 * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    reduced = DenseFeatures(vectors * roots, False, None, torch.float64, full.device)

    def method(run: Run, point: Point) -> Point:
        inner = full.scores(point.weight).double().T @ vectors / roots
        run.features = reduced
        gram = reduced.gram(weight) / run.data.total
        if run.smoothed is not None:
            round_corners(run)  # its bundle held gradients with respect to the weights of all features
        point = run.fresh(inner)
        point = _with_gram(run, point, gram)(run, point)
        run.features = full
        run.best = None
        point.weight = full.gradient(vectors / roots @ point.weight.T)[:, :-1].double()
        return point

    return method


def _finish(run: Run, point: Point, on_failure: str, asked: torch.dtype | None) -> Solution:
    found = point.certificate
    mean, std = run.features.standardization
    raw, bias = point.weight / std, run.bias.value
    if run.data.outputs > 1:
        bias = bias - bias.mean()  # the scores of every multiclass loss are free up to one number per sample
    solution = Solution(
        raw, bias - raw @ mean, found.primal, found.gap, run.passes, time.perf_counter() - run.started,
        found.gap <= run.tol, tuple(run.history), found, run.features.standardization, run.data.loss.name,
    )  # fmt: skip
    if not solution.converged and on_failure == "raise":
        cure = "raise max_passes" if run.spent else "rounding allows no less"
        if not run.spent and asked == torch.float32:
            cure = "products in torch.float32 allow no less: use dtype=torch.float64"
        raise NotConvergedError(
            f"stopped after {run.passes:g} passes at a gap of {found.gap:.2g}, but tol is {run.tol:g}: {cure}, or take "
            "what was reached with on_failure='return'",
            solution,
        )
    return solution


def _check(loss: Loss, penalty: Penalty | None) -> None:
    if not _has_corners(loss):
        return
    if not isinstance(loss, RivalProjection):
        raise TypeError(
            f"the {loss.name} loss has no full-batch solver: W = 0 is a global minimiser of it. "
            "Train it with LinearClassifier, or use loss='hinge'"
        )
    if penalty is not None and penalty.l1 > 0:
        raise TypeError(f"the {loss.name} loss is solved with an L2 penalty or none, got {penalty}")


def _has_corners(loss: Loss) -> bool:
    return loss.smoothness(2) is None


def _penalised(penalty: Penalty | None) -> bool:
    return penalty is not None and (penalty.l1 > 0 or penalty.l2 > 0)


def _classes(loss: Loss, target: Tensor, num_classes: int | None) -> int:
    loss._check_dtypes(torch.zeros(1, 1), target)
    valid = target[target != loss.ignore_index].long()
    if len(valid) == 0:
        raise ValueError("no sample counts: all targets are ignore_index")
    counts = torch.bincount(valid.clamp(min=0), minlength=num_classes or 0)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(
            f"class {absent[0]} has no sample, so its bias has no minimum: renumber the classes that occur"
        )
    if len(counts) < 2:
        raise ValueError("all samples are of one class: there is nothing to tell apart")
    return num_classes or len(counts)


def _loss_of(loss: Loss | str, class_weight: Tensor | Sequence[float] | None) -> Loss:
    if isinstance(loss, str):
        return LOSS_REGISTRY.make({"name": loss} if class_weight is None else {"name": loss, "weight": class_weight})
    if class_weight is not None:
        raise ValueError("class_weight is given with the name of a loss; a Loss has its own: SoftmaxLoss(weight=…)")
    return loss


def _weights(loss: Loss, target: Tensor, sample_weight: Tensor | None) -> Tensor | None:
    per_class, counts = loss.sample_weights(target)
    if loss.weight is None and bool(counts.all()):
        return sample_weight
    return per_class.double() if sample_weight is None else per_class * sample_weight.to(per_class)
