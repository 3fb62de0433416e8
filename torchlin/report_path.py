"""Pictures of what the solvers did: a path of strengths, the gap falling."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from torchlin.solvers import PathResult, Solution

_MOST_LINES = 12
_MOST_TICKS = 6


def plot_path(path: PathResult, ax: Axes | None = None) -> Axes:
    """Objective, accuracy, share of non-zero weights and the largest weights against λ, the chosen λ marked.

    λ falls to the right, so that the model grows from left to right. The weights are those in standardised
    coordinates, in which λ acts; the twelve that become largest are drawn.

    Args:
        path: what `solve_path` returned.
        ax: where to draw; its place holds the four panels. Returned.

    Raises:
        ValueError: a path without a point.
    """
    if not path.solutions:
        raise ValueError("nothing to draw: the path has no solutions")
    if ax is None:
        ax = _new_axes(8.2, 5.8)
    ax.set_axis_off()
    places = {(0, 0): (0.0, 0.57), (0, 1): (0.56, 0.57), (1, 0): (0.0, 0.0), (1, 1): (0.56, 0.0)}
    panels = {key: ax.inset_axes((x, y, 0.44, 0.43)) for key, (x, y) in places.items()}
    strengths = np.array(path.strengths)

    panel = panels[0, 0]
    panel.plot(strengths, [s.objective for s in path.solutions], color="tab:blue")
    panel.set_ylabel("objective")

    panel = panels[0, 1]
    panel.plot(strengths, path.train_accuracy, color="tab:blue", label="training")
    if path.val_accuracy:
        panel.plot(strengths, path.val_accuracy, color="tab:orange", label="validation")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_ylabel("accuracy")
    panel.legend(frameon=False, fontsize=8, loc="lower right")

    panel = panels[1, 0]
    panel.plot(strengths, path.nonzero, color="tab:blue")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set(ylabel="non-zero weights", ylim=(-0.03, 1.03))

    panel = panels[1, 1]
    std = path.solutions[0].standardization.std
    weights = torch.stack([s.weight * std for s in path.solutions]).flatten(1).cpu()
    largest = weights.abs().amax(0).topk(min(_MOST_LINES, weights.shape[1])).indices
    panel.plot(strengths, weights[:, largest].numpy(), linewidth=1)
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_ylabel("weight × σ")

    for (row, _), panel in panels.items():
        panel.set_xscale("log")
        if len(strengths) > 1:
            panel.set_xlim(strengths[0], strengths[-1])
        panel.xaxis.set_major_locator(LogLocator(numticks=_MOST_TICKS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
        if row == 1:
            panel.set_xlabel("strength λ")
        if path.index is not None:
            panel.axvline(strengths[path.index], color="black", linestyle=":", linewidth=1)
    if path.index is not None:
        # Over the upper left panel, whose line it names.
        panels[0, 0].set_title(f"chosen: λ = {strengths[path.index]:.3g}", fontsize=9, loc="left")
    return ax


def plot_gap(solution: Solution, ax: Axes | None = None) -> Axes:
    """The certified relative gap against passes over the data.

    Args:
        solution: what `solve` returned. ax: where to draw; returned.
    """
    if ax is None:
        ax = _new_axes(6.4, 4.4)
    known = [(p.passes, p.gap) for p in solution.history if 0 < p.gap < float("inf")]
    ax.plot([p for p, _ in known], [g for _, g in known], color="tab:blue", marker="o", markersize=4)
    gap = solution.certificate.measure == "gap"
    ax.set(xlabel="passes over the data", ylabel="relative gap" if gap else "norm of the gradient", yscale="log")
    ax.grid(alpha=0.25)
    return ax


def _new_axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt  # here, because pyplot settles on a backend

    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax
