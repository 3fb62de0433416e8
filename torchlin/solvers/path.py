"""The same problem for a grid of λ, and the choice of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchlin.features import FeatureMatrix
from torchlin.losses import Loss
from torchlin.penalties import L2, Penalty
from torchlin.solvers.problem import Bias, DataTerm
from torchlin.solvers.solution import Solution
from torchlin.solvers.solve import _classes, _loss_of, _weights, solve

Criterion = Literal["accuracy", "loss"]

# Scores of several solutions come out of one product; this many columns of float64 scores are held at a time.
_SCORE_BYTES = 1 << 28


@dataclass(frozen=True)
class PathResult:
    """Certified solutions along a grid of λ, the strongest penalty first.

    Attributes:
        strengths: λ, decreasing. solutions: one for each, on the training data.
        chosen: the solution on everything (training and validation data) at the chosen λ; None if nothing chose.
        index: where in `strengths` that is.
        nonzero: share of weights that are not zero, for each λ.
        train_accuracy: for each λ. val_accuracy, val_loss: the same on validation data, or, with folds, of every sample
            by the solution that did not see it; empty if there was neither.
        passes: over the data, in all. seconds: wall-clock.
    """

    strengths: tuple[float, ...]
    solutions: tuple[Solution, ...]
    chosen: Solution | None
    index: int | None
    nonzero: tuple[float, ...]
    train_accuracy: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    val_loss: tuple[float, ...]
    passes: float
    seconds: float

    @property
    def at_edge(self) -> bool:
        """Whether the chosen λ is the first or the last: a better one may lie beyond the grid."""
        return self.index in (0, len(self.strengths) - 1)


def solve_path(
    features: Tensor | FeatureMatrix,
    target: Tensor,
    loss: Loss | str = "softmax",
    penalty: Callable[[float], Penalty] = L2,
    *,
    strengths: Sequence[float] | None = None,
    num: int = 30,
    ratio: float = 1e-4,
    validation: tuple[Tensor, Tensor] | Tensor | None = None,
    folds: int | Sequence[Tensor] | None = None,
    criterion: Criterion = "accuracy",
    seed: int = 0,
    refit: bool = True,
    num_classes: int | None = None,
    tol: float = 1e-4,
    max_passes: float = 1000,
    standardize: bool = True,
    bias: bool = True,
    class_weight: Tensor | Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_failure: Literal["raise", "return"] = "raise",
    report: Callable[[float, Solution], None] | None = None,
) -> PathResult:
    """Minimise F for a geometric grid of λ, each from the solution before it, and choose one on data it did not see.

    The grid starts at `strength_max` and ends at `ratio` times that. The Gram matrix is computed once. With folds the
    solutions that leave a part out are problems of the same features with sample weights 0: they share μ, σ and the
    Gram matrix, from which only that of the part is subtracted, and start at the solution on everything.

    Args:
        features, target, loss, num_classes, standardize, bias, class_weight, sample_weight, dtype, device: see `solve`.
        penalty: λ ↦ penalty: `L2`, `L1`, or `lambda strength: ElasticNet(strength, 0.3)`.
        strengths: the λ themselves, > 0, in any order; `num` and `ratio` then do not count.
        validation: (features, target) to choose λ on; or row numbers of `features`, which then do not count until the
            choice is made, but share μ, σ and the Gram matrix.
        folds: how many parts to leave out in turn (stratified by class, drawn with `seed`), or the rows of each part.
        criterion: the best validation accuracy, or the smallest validation loss; of equals the largest λ.
        refit: False leaves `chosen` at the solution on the training data alone.
        tol, max_passes, on_failure: for every λ, as in `solve`.
        report: called with λ and its solution, along the grid of the training data.

    Raises:
        NotConvergedError: some λ was not solved to `tol`.
        ValueError: both validation and folds, a grid that is none, fewer samples of a class than 2 with folds.
        TypeError: a `FeatureMatrix` with validation data and refit: there is no joining them.
    """
    started = time.perf_counter()
    loss = _loss_of(loss, class_weight)
    if validation is not None and folds is not None:
        raise ValueError("λ is chosen by validation data or by folds, but both are given")
    if criterion not in ("accuracy", "loss"):
        raise ValueError(f"criterion is 'accuracy' or 'loss', got {criterion!r}")
    apart = None if isinstance(validation, Tensor) else validation
    if apart is not None and refit and isinstance(features, FeatureMatrix):
        raise TypeError("a FeatureMatrix cannot be joined with validation data: give tensors, or refit=False")
    k = _classes(loss, target, num_classes)
    x = SharedGram(
        FeatureMatrix.of(
            features, standardize=standardize, weight=_weights(loss, target, sample_weight), dtype=dtype, device=device
        )
    )
    target = target.to(x.device)
    parts = None if folds is None else _parts(folds, target, loss, seed)
    counting, seen_weight = torch.arange(len(target), device=target.device), sample_weight
    inside = None
    if isinstance(validation, Tensor):
        inside = _parts([validation], target, loss, seed)[0]
        seen_weight = _without(inside, sample_weight, x)
        counting = seen_weight.nonzero().flatten()
    if strengths is None:
        first = strength_max(x, target, loss, penalty, sample_weight=seen_weight, bias=bias)
        strengths = _grid(first, num, ratio)
    else:
        strengths = sorted((float(s) for s in strengths), reverse=True)
        if not strengths or not strengths[-1] > 0:
            raise ValueError(f"strengths are positive numbers, got {strengths}")

    def sweep(weight: Tensor | None, starts: Sequence[Solution] | None) -> Iterator[Solution]:
        before: list[Solution] = []
        for i, strength in enumerate(strengths):
            warm = starts[i] if starts is not None else _ahead(before)
            found = solve(
                x, target, loss, penalty(strength), num_classes=k, tol=tol, max_passes=max_passes, bias=bias,
                sample_weight=weight, warm_start=warm, on_failure=on_failure,
            )  # fmt: skip
            before = [*before[-1:], found]
            yield found

    solutions = []
    for strength, found in zip(strengths, sweep(seen_weight, None), strict=True):
        solutions.append(found)
        if report is not None:
            report(strength, found)
    passes = sum(s.passes for s in solutions)
    train_accuracy, _ = _measure(x, target, loss, solutions, counting, sample_weight)
    chosen: Solution | None = None
    val_accuracy: list[float] = []
    val_loss: list[float] = []
    if inside is not None:
        val_accuracy, val_loss = _measure(x, target, loss, solutions, inside, sample_weight)
    if apart is not None:
        held = FeatureMatrix.of(apart[0], standardize=False, dtype=dtype, device=device)
        seen = apart[1].to(held.device)
        rows = torch.arange(len(seen), device=held.device)
        val_accuracy, val_loss = _measure(held, seen, loss, solutions, rows, None)
    if parts is not None:
        shares = []
        for part in parts:
            without = list(sweep(_without(part, sample_weight, x), solutions))
            passes += sum(s.passes for s in without)
            measured = _measure(x, target, loss, without, part, sample_weight)
            share = len(part) if sample_weight is None else float(sample_weight[part.to(sample_weight.device)].sum())
            shares.append((share, measured))
        total = sum(share for share, _ in shares)
        val_accuracy, val_loss = (
            [sum(share * m[which][i] for share, m in shares) / total for i in range(len(strengths))] for which in (0, 1)
        )
    index = None
    if val_accuracy:
        merits = val_accuracy if criterion == "accuracy" else [-v for v in val_loss]
        index = max(range(len(merits)), key=lambda i: merits[i])  # the first of equals, the largest λ
        chosen = solutions[index]
    if chosen is not None and index is not None and validation is not None and refit:
        everything: Tensor | FeatureMatrix = x
        labels, weights = target, sample_weight
        if apart is not None:
            everything, labels = _joined(features, apart[0]), torch.cat((target, apart[1].to(target)))
            if sample_weight is not None:
                weights = torch.cat((sample_weight, sample_weight.new_ones(len(apart[1]))))
        chosen = solve(
            everything, labels, loss, penalty(strengths[index]), num_classes=k, tol=tol, max_passes=max_passes,
            standardize=standardize, bias=bias, sample_weight=weights, warm_start=chosen, dtype=dtype, device=device,
            on_failure=on_failure,
        )  # fmt: skip
        passes += chosen.passes
    return PathResult(
        tuple(strengths), tuple(solutions), chosen, index,
        tuple(float((s.weight != 0).double().mean()) for s in solutions), tuple(train_accuracy),
        tuple(val_accuracy), tuple(val_loss), passes, time.perf_counter() - started,
    )  # fmt: skip


def strength_max(
    features: FeatureMatrix,
    target: Tensor,
    loss: Loss,
    penalty: Callable[[float], Penalty],
    *,
    sample_weight: Tensor | None = None,
    bias: bool = True,
) -> float:
    """Where a path starts. With V = ∇W of the data term at W = 0, the bias being solved:

        ‖V‖_∞ / α        under a penalty with an L1 part: the smallest λ whose minimiser is W = 0, exactly
        ‖V‖² / (4 F(0))  under L2, which has W = 0 for no λ: where D = F(0) − ‖V‖²/(4λ) falls to 0, so that below it
                         W = 0 is no longer certified to be near the minimiser at all

    For a loss that is not smooth V is one of the subgradients.
    """
    k = loss.outputs(int(target.max()) + 1)
    data = DataTerm(loss, target, k, sample_weight)
    zero = torch.zeros(k, len(target), dtype=torch.float64, device=features.device).T
    at_zero = data.value(zero)
    free = bias and loss.smoothness(k) is not None
    gradient = Bias(data).solve(zero).gradient if free else data.gradient(zero)
    v = features.gradient(data.weighted(gradient))[:, :-1].double()
    alpha = penalty(1.0).alpha
    found = float(v.abs().max()) / alpha if alpha > 0 else float(v.square().sum()) / (4 * at_zero)
    if not found > 0:
        raise ValueError("the features say nothing about the target: W = 0 is the minimiser for every λ")
    return found


class SharedGram(FeatureMatrix):
    """Features whose Gram and kernel matrices are computed once for all problems on them.

    Where the weights of a few samples differ, as where some are left out, only their share is added or subtracted.
    """

    def __init__(self, features: FeatureMatrix) -> None:
        self.features, self.shape = features, features.shape
        self.dtype, self.device = features.dtype, features.device
        self.standardization = features.standardization
        self.computed = 0
        self._gram: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._kernel: Tensor | None = None

    @property
    def numbers(self) -> int:
        return self.features.numbers

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.features.scores(weight, bias)

    def gradient(self, score_gradient: Tensor) -> Tensor:
        return self.features.gradient(score_gradient)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.features.rows(index)

    def columns(self, index: Tensor) -> Tensor:
        return self.features.columns(index)

    def kernel(self) -> Tensor:
        if self._kernel is None:
            self._kernel = self.features.kernel()
        return self._kernel

    def gram(self, weight: Tensor | None = None) -> Tensor:
        s = torch.ones(self.shape[0], dtype=torch.float64, device=self.device)
        s = s if weight is None else weight.to(s)
        for known in (self._gram, self._last):
            if known is not None and torch.equal(known[0], s):
                return known[1]
        if self._gram is None:
            self._gram = s, self.features.gram(weight)
            self.computed += 1
            return self._gram[1]
        every, gram = self._gram
        other = (every != s).nonzero().flatten()
        few = 2 * len(other) <= self.shape[0]
        gram = gram + self._part(other, s - every) if few else self.features.gram(weight)
        self._last = s, gram
        return gram

    def _part(self, index: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(self.shape[1], self.shape[1], dtype=self.dtype, device=self.device)
        # Large ones serve as models and preconditioners, for which float32 is exact enough.
        kind = torch.float32 if self.shape[1] > 1000 else self.dtype
        for block in index.split(4096):
            rows = self.features.rows(block).to(kind)
            total += rows.T @ (rows * weight[block].to(kind).unsqueeze(1))
        return total


def _without(part: Tensor, sample_weight: Tensor | None, x: FeatureMatrix) -> Tensor:
    """The sample weights, 0 for the rows of a part."""
    ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    return (ones if sample_weight is None else ones * sample_weight.to(ones)).index_fill(0, part, 0.0)


def _grid(first: float, num: int, ratio: float) -> list[float]:
    if num < 1 or not 0 < ratio < 1:
        raise ValueError(f"a grid has num ≥ 1 strengths and a ratio between 0 and 1, got num={num}, ratio={ratio}")
    return [first * ratio ** (i / max(1, num - 1)) for i in range(num)]


def _ahead(before: Sequence[Solution]) -> Solution | None:
    """Where the path seems to go: one step of the grid further on the line through the last two solutions."""
    if len(before) < 2:
        return before[-1] if before else None
    a, b = before
    moved = replace(b, weight=2 * b.weight - a.weight, bias=2 * b.bias - a.bias)
    # What was zero stays: an L1 path enters features one by one.
    return replace(moved, weight=torch.where(b.weight == 0, 0.0, moved.weight))


def _parts(folds: int | Sequence[Tensor], target: Tensor, loss: Loss, seed: int) -> list[Tensor]:
    """The rows of each part, sorted; every class is spread evenly over the parts."""
    if not isinstance(folds, int):
        parts = [part.to(target.device).long() for part in folds]
        for part in parts:
            kept = torch.ones_like(target, dtype=torch.bool).index_fill(0, part, False)
            lost = sorted({*target.tolist()} - {*target[kept].tolist()} - {loss.ignore_index})
            if lost:
                raise ValueError(f"one of the folds holds every sample of class {lost[0]}: nothing is left to train on")
        return parts
    if not 2 <= folds <= len(target):
        raise ValueError(f"folds is at least 2 and at most the number of samples, {len(target)}, got {folds}")
    labels = target.cpu().long()
    valid = labels[labels != loss.ignore_index]
    counts = torch.bincount(valid)
    lonely = (counts == 1).nonzero().flatten().tolist()
    if lonely:
        raise ValueError(f"class {lonely[0]} has 1 sample: with folds, every class needs 2")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].sort(stable=True).indices]
    return [order[i::folds].sort().values.to(target.device) for i in range(folds)]


@torch.no_grad()
def _measure(
    x: FeatureMatrix, target: Tensor, loss: Loss, solutions: Sequence[Solution], rows: Tensor, weight: Tensor | None
) -> tuple[list[float], list[float]]:
    """Accuracy and mean loss of each solution on some rows, the scores of many solutions from one product."""
    mean, std = x.standardization
    k = len(solutions[0].weight)
    together = max(1, _SCORE_BYTES // (8 * k * x.shape[0]))
    y = target[rows]
    data = DataTerm(loss, y, k, None if weight is None else weight.to(mean)[rows])
    accuracies, losses = [], []
    for start in range(0, len(solutions), together):
        some = solutions[start : start + together]
        w = torch.cat([s.weight.to(mean) for s in some])
        b = torch.cat([s.bias.to(mean) for s in some])
        scores = x.scores(w * std, b + w @ mean).double()
        for i in range(len(some)):
            z = scores[rows, i * k : (i + 1) * k]
            losses.append(data.value(z))
            accuracies.append(data.mean((loss.predict(z) == y).double()))
    return accuracies, losses


def _joined(one: Tensor | FeatureMatrix, two: Tensor) -> Tensor:
    assert isinstance(one, Tensor)
    if one.layout != torch.sparse_csr:
        return torch.cat((one, two.to(one)))
    a, b = one, two.to(one.device)
    return torch.sparse_csr_tensor(
        torch.cat((a.crow_indices(), b.crow_indices()[1:].to(a.crow_indices()) + len(a.values()))),
        torch.cat((a.col_indices(), b.col_indices().to(a.col_indices()))),
        torch.cat((a.values(), b.values().to(a.values()))),
        (a.shape[0] + b.shape[0], a.shape[1]),
        check_invariants=True,
    )
