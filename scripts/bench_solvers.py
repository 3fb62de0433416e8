"""torchlin's certified solvers and scikit-learn's, side by side: sub-optimality of the objective against seconds.

    python scripts/bench_solvers.py [--problems digits wide text classes cifar10] [--root FOLDER] [--scale 1]
                                    [--rivals NAME …] [--limit 60] [--threads N] [--device cuda]
                                    [--output bench_solvers.png]

digits   scikit-learn's 1,797 digits
wide     generated photographs, far more features than samples: 200 × 20,000
text     generated bags of words, sparse: 20,000 × 20,000 with 60 words in each
classes  generated features of 100 classes: 20,000 × 256
cifar10  50,000 × 3,072 pixels; FOLDER holds train/ with one folder of images per class

--scale multiplies the samples (and the features of wide and text). Softmax × L2 and L1; the objective and the
standardised features are the same for all. scikit-learn gets them ready made, torchlin gets raw input and its seconds
include everything. A rival runs until it reaches 1e-6 or passes --limit seconds, its objective noted whenever it is
evaluated; that of saga, which evaluates none, four times a second, off the clock.
Sub-optimality is (F − D)/F with D the best lower bound that torchlin certified, so it is never understated; the row of
certified gaps has what torchlin had proved by then, and ends when `solve` returns.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sklearn
import torch
from cifar10 import train_pixels
from matplotlib.ticker import NullFormatter
from scipy.sparse import csr_matrix
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model._linear_loss import LinearModelLoss
from sklearn.linear_model._sag import sag_solver
from sklearn.utils.extmath import row_norms
from torch import Tensor

from torchlin import L1, L2, FeatureMatrix, Penalty, SoftmaxLoss, solve
from torchlin.solvers.path import strength_max
from torchlin.solvers.state import Progress

LEVELS = (1e-3, 1e-6)
GOAL = 1e-6
CERTIFIED = "torchlin, certified"
Point = tuple[float, float]  # seconds, sub-optimality


@dataclass
class Problem:
    """Raw input for torchlin, and the same standardised (or left as it is) for scikit-learn."""

    name: str
    x: Tensor
    y: Tensor
    standardize: bool

    def ready(self) -> Any:
        if self.x.layout == torch.sparse_csr:
            parts = (self.x.values(), self.x.col_indices(), self.x.crow_indices())
            return csr_matrix(tuple(t.numpy() for t in parts), shape=tuple(self.x.shape))
        rows = FeatureMatrix.of(self.x, standardize=self.standardize, dtype=torch.float64).rows(slice(0, len(self.x)))
        return rows.numpy()


def problems(names: list[str], root: str | None, scale: float) -> Iterator[Problem]:
    rng = np.random.default_rng(0)
    for name in names:
        if name == "digits":
            x, y = load_digits(return_X_y=True)
            keep = max(100, min(len(y), round(scale * len(y))))
            yield Problem(name, torch.from_numpy(x[:keep] / 16), torch.from_numpy(y[:keep]), True)
        elif name == "wide":
            n, p, k = max(20, round(200 * scale)), max(100, round(20_000 * scale)), 4
            y = np.arange(n) % k
            light = 30 * rng.normal(size=(n, 8)) @ rng.normal(size=(8, p)) / 3  # neighbouring pixels go together
            pixels = np.clip(128 + light + 4 * rng.normal(size=(k, p))[y] + 10 * rng.normal(size=(n, p)), 0, 255)
            yield Problem(name, torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(y), True)
        elif name == "text":
            n, p, k, words = max(60, round(20_000 * scale)), max(200, round(20_000 * scale)), 20, 60
            y = np.arange(n) % k
            popular = 1 / np.arange(1, p + 1)
            topics = [popular * rng.gamma(0.3, size=p) for _ in range(k)]
            drawn = np.concatenate([rng.choice(p, (n // k + 1, words), p=t / t.sum()) for t in topics])
            rows = drawn.reshape(k, -1, words).swapaxes(0, 1).reshape(-1, words)[:n]
            where = (np.repeat(np.arange(n), words), rows.ravel())
            counts = csr_matrix((np.ones(n * words), where), shape=(n, p))
            counts.sum_duplicates()
            counts.data = np.log1p(counts.data)
            parts = (counts.indptr, counts.indices, counts.data)
            crow, column, values = (torch.from_numpy(a) for a in parts)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                x = torch.sparse_csr_tensor(crow.long(), column.long(), values, (n, p), check_invariants=True)
            yield Problem(name, x, torch.from_numpy(y), False)
        elif name == "classes":
            n, p, k = max(300, round(20_000 * scale)), 256, 100
            y = np.arange(n) % k
            x = (0.25 * rng.normal(size=(k, p))[y] + rng.normal(size=(n, p))) @ rng.normal(size=(p, p)) / 16
            yield Problem(name, torch.from_numpy(x), torch.from_numpy(y), True)
        elif name == "cifar10":
            inputs, targets = train_pixels(root)
            keep = max(100, min(len(targets), round(scale * len(targets))))
            yield Problem(name, inputs[:keep], targets[:keep], True)
        else:
            raise SystemExit(f"unknown problem {name!r}; known: digits, wide, text, classes, cifar10")


def objective(penalty: Penalty, x: Any, y: Tensor, weight: np.ndarray, bias: np.ndarray) -> float:
    if len(weight) == 1:  # two classes: the same scores from two rows
        raise SystemExit("the problems have more than two classes")
    loss, total = SoftmaxLoss(), 0.0
    for start in range(0, len(y), 4096):
        z = torch.from_numpy(np.asarray(x[start : start + 4096] @ weight.T) + bias).double()
        total += float(loss.value(z, y[start : start + 4096]).sum())
    return total / len(y) + float(penalty.value(torch.from_numpy(weight).double()))


class OutOfTime(Exception):
    pass


def torchlin_curve(
    problem: Problem, penalty: Penalty, device: str | None, limit: float
) -> tuple[list[Point], list[Point], float]:
    """(seconds, F) after each pass, (seconds, certified gap), the last when `solve` returns, and D."""
    points: list[Point] = []
    certified: list[Point] = []
    bound = 0.0
    floor = 1e-3 * math.log(int(problem.y.max()) + 1)  # the gap is relative to F, or to this where F is smaller

    def watch(at: Progress) -> None:
        nonlocal bound
        points.append((at.seconds, at.objective))
        certified.append((at.seconds, at.gap))
        bound = max(bound, at.objective - at.gap * max(at.objective, floor))
        if at.seconds > limit:
            raise OutOfTime

    with suppress(OutOfTime):
        solution = solve(
            problem.x, problem.y, "softmax", penalty, tol=GOAL, standardize=problem.standardize, device=device,
            max_passes=100_000, on_failure="return", report=watch,
        )  # fmt: skip
        certified.append((solution.seconds, solution.gap))
    return points, certified, bound


@contextmanager
def watching(seen: Callable[[float], None]) -> Iterator[None]:
    """Call `seen` with the objective whenever scikit-learn evaluates it: (1/N) Σ L_i + λ Σ w², as in torchlin."""
    methods = ("loss", "loss_gradient")
    originals = {name: getattr(LinearModelLoss, name) for name in methods}

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            seen(float(result[0] if isinstance(result, tuple) else result))
            return result

        return call

    for name, method in originals.items():
        setattr(LinearModelLoss, name, watched(method))
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(LinearModelLoss, name, method)


def rival_curve(solver: str, penalty: Penalty, x: Any, y: Tensor, bound: float, limit: float) -> list[Point]:
    """(seconds, F) of a rival's evaluations, or after each of saga's passes over the data."""
    # What a first call loads is no part.
    LogisticRegression(solver=solver, max_iter=100_000).fit(np.eye(3), np.arange(3))
    if solver == "saga":
        return list(saga_curve(penalty, x, y, bound, limit))
    model = LogisticRegression(C=1 / (2 * len(y) * penalty.l2), solver=solver, tol=1e-12, max_iter=100_000)
    points: list[Point] = []
    started = time.perf_counter()

    def seen(value: float) -> None:
        points.append((time.perf_counter() - started, min([value, *(v for _, v in points[-1:])])))
        if (points[-1][1] - bound) / points[-1][1] <= GOAL or points[-1][0] > limit:
            raise OutOfTime

    with suppress(OutOfTime), watching(seen):
        model.fit(x, y.numpy())
    return points


def saga_curve(penalty: Penalty, x: Any, y: Tensor, bound: float, limit: float) -> Iterator[Point]:
    """saga as LogisticRegression calls it, stopped for a look every quarter of a second, or after every pass over the
    data where one takes longer; F is computed off the clock."""
    n, p = x.shape
    labels, ones = y.numpy().astype(np.float64), np.ones(n)
    state: dict[str, Any] = {"coef": np.zeros((p + 1, int(y.max()) + 1))}
    started = time.perf_counter()
    largest = row_norms(x, squared=True).max()
    seconds = time.perf_counter() - started
    passes, count = 0, 1
    while True:
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            coef, _, state = sag_solver(
                x, labels, ones, "multinomial", 0.0, n * penalty.l1, count, 1e-12, 0, passes, False, largest, state,
                is_saga=True,
            )  # fmt: skip
        seconds += time.perf_counter() - started
        passes += count
        count = max(1, int(0.25 * passes / seconds))
        value = objective(penalty, x, y, coef[:, :-1], coef[:, -1])
        yield seconds, value
        if (value - bound) / value <= GOAL or seconds > limit:
            return


def reached(curve: list[Point], level: float) -> float:
    return next((seconds for seconds, gap in curve if gap <= level), math.inf)


def rivals_of(penalty: Penalty, problem: Problem) -> tuple[str, ...]:
    if penalty.l1 > 0:
        return ("saga",)
    small = problem.x.layout != torch.sparse_csr and problem.x.shape[1] * int(problem.y.max() + 1) <= 3000
    return ("lbfgs", "newton-cg", "newton-cholesky") if small else ("lbfgs", "newton-cg")


def measure(
    problem: Problem, family: Callable[[float], Penalty], options: argparse.Namespace
) -> tuple[str, dict[str, list[Point]]]:
    """The name of the case, and solver → curve."""
    features = FeatureMatrix.of(problem.x, standardize=problem.standardize)
    first = strength_max(features, problem.y, SoftmaxLoss(), family)
    penalty = family(first / 20 if family is L1 else options.strength)
    del features
    raw, certified, bound = torchlin_curve(problem, penalty, options.device, options.limit)
    x = problem.ready()
    raws = {"torchlin": raw}
    for solver in rivals_of(penalty, problem):
        if options.rivals and solver not in options.rivals:
            continue
        raws[solver] = rival_curve(solver, penalty, x, problem.y, bound, options.limit)
    shape = " × ".join(f"{v:,}" for v in problem.x.shape)
    curves = {name: [(s, (value - bound) / value) for s, value in points] for name, points in raws.items()}
    curves = {"torchlin": curves.pop("torchlin"), CERTIFIED: certified} | curves
    return f"{problem.name} ({shape}), {penalty.name} {penalty.strength:.2g}", curves


def print_rows(title: str, curves: dict[str, list[Point]]) -> None:
    for name, curve in curves.items():
        times = [reached(curve, level) for level in LEVELS]
        cells = [f"{t:.3g}" if math.isfinite(t) else "–" for t in times]
        last = curve[-1]
        print(f"| {title} | {name} | {' | '.join(cells)} | {max(last[1], 0):.1e} after {last[0]:.3g} s |", flush=True)
        title = ""


def plot(cases: dict[str, dict[str, list[Point]]], path: str) -> None:
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    for ax, (title, curves) in zip(axes.flat, cases.items(), strict=False):
        for name, curve in curves.items():
            shown = [(s, max(gap, GOAL / 30)) for s, gap in curve]
            ax.plot(
                *zip(*shown, strict=True),
                marker="o" if len(shown) < 60 else "",
                markersize=3,
                label=name,
                linestyle="--" if name == CERTIFIED else "-",
                zorder=3 if name.startswith("torchlin") else 2,
            )
        ax.set(xscale="log", yscale="log", ylim=(GOAL / 40, 3))
        ax.set_title(title, fontsize=9)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=8, loc="lower left")
        ax.set(xlabel="seconds", ylabel="sub-optimality (F − D)/F")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits", "wide", "text", "classes"])
    parser.add_argument("--root")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--strength", type=float, default=1e-3, help="λ of L2; that of L1 is a 20th of its largest")
    parser.add_argument("--penalties", nargs="+", choices=("l2", "l1"), default=["l2", "l1"])
    parser.add_argument("--rivals", nargs="+", help="of scikit-learn's solvers only these")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {machine}, {options.threads} threads, "
        f"torchlin on {options.device or 'cpu'}\n"
    )
    print("| problem | solver | seconds to 1e-3 | seconds to 1e-6 | at the end |")
    print("|---|---|---|---|---|")
    cases = {}
    for problem in problems(options.problems, options.root, options.scale):
        for name in options.penalties:
            title, curves = measure(problem, {"l2": L2, "l1": L1}[name], options)
            print_rows(title, curves)
            cases[title] = curves
    if options.output:
        plot(cases, options.output)


if __name__ == "__main__":
    main()
