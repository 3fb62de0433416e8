"""Pictures of a trained head: its templates, learning curves, confusion matrix, and the losses as curves.

Every `plot_*` draws into the Axes it is given, or into a new figure of a fitting size (made with `plt.subplots`, so the
caller shows or closes it), and returns the Axes. Nothing here shows a window or chooses a backend.
"""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from torchlin.heads import LinearHead, StandardizedHead
from torchlin.losses import LOSS_REGISTRY, Loss
from torchlin.report_path import plot_gap as plot_gap
from torchlin.report_path import plot_path as plot_path
from torchlin.storage import replace_file

MAX_TEMPLATES = 100
_MAX_NUMBERED = 20  # confusion matrices up to this many classes have their counts written in the cells
_DIVERGING = "RdBu_r"


# Class templates.


def plot_templates(
    head: LinearHead,
    class_names: Sequence[str] | None = None,
    shape: Sequence[int] | None = None,
    ax: Axes | None = None,
    *,
    std: Tensor | None = None,
) -> Axes:
    """The rows of W, one template per class.

    Images: a mosaic in one Axes with the class name over each. Grey templates share one colour scale, symmetric around
    0; the channels of an RGB template show ½ + w / (2 max|w|), each template on its own scale, so that grey means 0.
    Anything else: a heatmap of W, (k, p), whose columns are features. A head with a single score (logistic) has one
    template, "second class − first class".

    Args:
        head: weight (k, p), on raw input (a standardised head is folded, an absorbed bias is left out).
        class_names: k names, or 2 for a single score; by default those of `head.info`, else the indices.
        shape: (C, H, W) with C·H·W = p; by default that of `head.info`. Only C = 1 and C = 3 are drawn as images.
        ax: where to draw.
        std: σ of the features, (p,); draws W·σ, what one standard deviation of each feature adds to a score. Raw
            weights of features that hardly ever vary can be so large that nothing else is seen.

    Beyond 100 classes an image mosaic shows the first 100 and says so.

    Raises:
        ValueError: the number of names does not match the head, or the product of `shape` is not p.
    """
    if isinstance(head, StandardizedHead):
        head = head.fold()
    raw = head.penalized(head.weight).detach().cpu().float()
    weight = (raw if std is None else raw * std.cpu()).numpy()
    unit = "weight" if std is None else "weight × σ"
    rows, features = weight.shape
    names = _row_names(head, class_names)
    described = head.info.get("input", {})
    if shape is None:
        shape = described.get("shape") or (features,)
    if math.prod(shape) != features:
        raise ValueError(f"shape {tuple(shape)} has {math.prod(shape)} numbers, the head has in_features={features}")
    labels = names if rows > 1 else [f"{names[1]} − {names[0]}"]
    if len(shape) == 3 and shape[0] in (1, 3):
        channels, height, width = shape
        templates = weight[:MAX_TEMPLATES].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        ax = _mosaic(templates, labels, unit, ax)
    else:
        ax = _heatmap(weight, labels, described.get("feature_names"), unit, ax)
    if rows == 1:
        ax.set_title(f"score > 0: {_shortened(names[1], 30)}", fontsize=10)
    return ax


def _row_names(head: LinearHead, class_names: Sequence[str] | None) -> list[str]:
    expected = max(2, head.out_features)
    if class_names is None:
        class_names = head.info.get("class_names") or [str(index) for index in range(expected)]
    if len(class_names) != expected and not len(class_names) == head.out_features == 1:
        raise ValueError(
            f"{len(class_names)} class names for a head with {head.out_features} "
            f"score{'s' if head.out_features > 1 else ''}: expected {expected}"
        )
    if len(class_names) == 1:
        return [f"not {class_names[0]}", str(class_names[0])]
    return [str(name) for name in class_names]


def _mosaic(templates: np.ndarray, labels: Sequence[str], unit: str, ax: Axes | None) -> Axes:
    """Templates (m, H, W, C) in a grid; `labels` may be more than m, the rest being left out."""
    count, height, width, channels = templates.shape
    columns = _columns(count)
    lines = math.ceil(count / columns)
    inches = 1.9 if count <= 4 else 1.15
    if ax is None:
        extra = 1.0 if channels == 1 else 0.2
        ax = _new_axes(max(3.6, columns * inches + extra), lines * inches * (height / width + 0.24) + 0.4)
    cell_width, cell_height = width * 1.08, height + width * 0.22
    # Set before the text is sized, so that the tile's size on the page is known.
    ax.set(xlim=(-0.04 * width, columns * cell_width), ylim=(lines * cell_height, 0), aspect="equal")
    ax.set_axis_off()

    limit = _scale(templates)
    image: AxesImage | None = None
    tile = _points(ax, columns * cell_width, lines * cell_height) * width
    font = min(11.0, max(3.5, tile * 0.125))
    for index, template in enumerate(templates):
        left, top = index % columns * cell_width, index // columns * cell_height + 0.2 * width
        if channels == 3:
            template = 0.5 + template / (2 * _scale(template))
        image = ax.imshow(
            template[..., 0] if channels == 1 else template,
            cmap=_DIVERGING,
            vmin=-limit,
            vmax=limit,
            interpolation="nearest" if max(height, width) <= 64 else "auto",
            extent=(left, left + width, top + height, top),
        )
        # A lone template has the whole width of the picture for its name.
        fits = int((1.06 if count > 1 else 1.6) * tile / (0.56 * font))
        label = _shortened(labels[index], fits)
        ax.text(left + width / 2, top - 0.03 * width, label, ha="center", va="bottom", fontsize=font)
    # imshow moves the limits to the last image.
    ax.set(xlim=(-0.04 * width, columns * cell_width), ylim=(lines * cell_height, 0))
    if count < len(labels):
        ax.set_title(f"the first {count} of {len(labels)} classes", fontsize=10)
    if channels == 1 and image is not None:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, aspect=25)
        bar.set_label(unit)
    return ax


def _columns(count: int) -> int:
    """A grid from square to twice as wide as tall, with the fewest empty places."""
    if count <= 4:
        return count
    root = math.sqrt(count)
    return min(range(math.ceil(root), math.ceil(2 * root)), key=lambda columns: (-count % columns, columns))


def _points(ax: Axes, width: float, height: float) -> float:
    """Points on the page per data unit of an Axes of equal aspect that shows width × height units."""
    box = ax.get_window_extent()
    return min(box.width / width, box.height / height) * 72 / ax.figure.dpi


def _heatmap(
    weight: np.ndarray, labels: Sequence[str], feature_names: Sequence[str] | None, unit: str, ax: Axes | None
) -> Axes:
    rows, features = weight.shape
    if ax is None:
        ax = _new_axes(min(12.0, max(4.5, 2.2 + 0.55 * features)), min(10.0, max(2.2, 1.4 + 0.36 * rows)))
    limit = _scale(weight)
    image = ax.imshow(weight, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    shown = _thinned(rows, 40)
    ax.set_yticks(shown, [_shortened(labels[i], 24) for i in shown], fontsize=9 if rows <= 25 else 7)
    named = feature_names is not None and len(feature_names) == features
    if named and feature_names is not None:
        shown = _thinned(features, 40)
        texts = [_shortened(str(feature_names[i]), 24) for i in shown]
        font = 9 if features <= 25 else 7
        ax.set_xticks(shown, texts, fontsize=font, rotation=40, ha="right", rotation_mode="anchor")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("feature")
    if features <= 12 and rows <= 12:
        for (i, j), value in np.ndenumerate(weight):
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=_ink(abs(value) / limit, 0.65))
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.set_label(unit)
    return ax


# Learning curves.


class _Curve(NamedTuple):
    column: str
    color: str
    style: str
    marker: str


# Colour says which split, the line which quantity; the objective is the training loss with the penalty on top.
_TRAIN, _VAL = "tab:blue", "tab:orange"
_LOSSES = (
    _Curve("train_objective", "tab:gray", ":", "."),
    _Curve("train_loss", _TRAIN, "-", "o"),
    _Curve("val_loss", _VAL, "-", "o"),
)
_ACCURACIES = (
    _Curve("train_accuracy", _TRAIN, "--", "s"),
    _Curve("val_accuracy", _VAL, "--", "s"),
    _Curve("val_balanced_accuracy", "tab:green", "--", "s"),
)


def plot_curves(
    metrics: str | os.PathLike[str] | Sequence[Mapping[str, object]],
    ax: Axes | None = None,
) -> Axes:
    """Learning curves: losses on the left axis (solid), accuracies on a twin right axis (dashed), over epochs.

    Args:
        metrics: a metrics.csv, or its rows, with a column `epoch` and any of `train_loss`, `val_loss`,
            `train_objective`, `train_accuracy`, `val_accuracy`, `val_balanced_accuracy`. Cells may be empty (a logger
            writes training and validation in separate rows); of several rows of an epoch the last that has a value
            counts. Without `epoch` the rows are numbered from 0.
        ax: where to draw; the Axes returned, which is the left one.

    Raises:
        ValueError: none of the columns holds a number.
    """
    if isinstance(metrics, (str, os.PathLike)):
        with Path(metrics).open(newline="", encoding="utf-8") as stream:
            rows: Sequence[Mapping[str, object]] = list(csv.DictReader(stream))
        source = str(metrics)
    else:
        rows, source = metrics, "metrics"
    losses = [(curve, points) for curve in _LOSSES if (points := _series(rows, curve.column))]
    accuracies = [(curve, points) for curve in _ACCURACIES if (points := _series(rows, curve.column))]
    if not losses and not accuracies:
        known = ", ".join(curve.column for curve in (*_LOSSES, *_ACCURACIES))
        found = ", ".join(dict.fromkeys(column for row in rows for column in row)) or "none"
        raise ValueError(f"{source}: nothing to draw; known columns are {known}; found {found}")

    if ax is None:
        ax = _new_axes(6.4, 4.4)
    lines: list[Line2D] = []
    ax.set_xlabel("epoch")
    epochs = sorted({epoch for _, points in (*losses, *accuracies) for epoch in points})
    if losses:
        ax.set_ylabel("loss (solid)" if accuracies else "loss")
        lines += _draw(ax, losses)
        bottom, top = ax.get_ylim()
        ax.set_ylim(min(0.0, bottom), top if len(epochs) > 1 else 1.15 * top)
    if accuracies:
        right = ax.twinx() if losses else ax
        right.set_ylabel("accuracy (dashed)" if losses else "accuracy")
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None if len(epochs) > 1 else 0))
        lines += _draw(right, accuracies)
        if len(epochs) == 1:  # nothing to zoom in on
            right.set_ylim(0, 1)
    if len(epochs) == 1:
        ax.set_xticks(epochs, [f"{epochs[0]:g}"])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        room = 0.02 * (epochs[-1] - epochs[0])
        ax.set_xlim(epochs[0] - room, epochs[-1] + room)
    ax.grid(alpha=0.25)
    # Under the picture, where it covers no line.
    columns = min(3, len(lines))
    ax.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns, frameon=False, fontsize=9)
    return ax


def _draw(ax: Axes, curves: Sequence[tuple[_Curve, dict[float, float]]]) -> list[Line2D]:
    lines = []
    for curve, points in curves:
        marker = curve.marker if len(points) <= 25 else ""
        (line,) = ax.plot(
            list(points),
            list(points.values()),
            color=curve.color,
            linestyle=curve.style,
            marker=marker,
            markersize=4,
            label=curve.column.replace("_", " "),
        )
        lines.append(line)
    return lines


def _series(rows: Sequence[Mapping[str, object]], column: str) -> dict[float, float]:
    """epoch → value, in the order of the epochs, of the rows that have one."""
    points: dict[float, float] = {}
    for number, row in enumerate(rows):
        value, epoch = _number(row.get(column)), _number(row.get("epoch", number))
        if value is not None and epoch is not None:
            points[epoch] = value
    return dict(sorted(points.items()))


def _number(cell: object) -> float | None:
    try:
        return None if cell is None else float(str(cell))
    except ValueError:
        return None


# The confusion matrix.


def plot_confusion(matrix: Tensor | np.ndarray, class_names: Sequence[str], ax: Axes | None = None) -> Axes:
    """A confusion matrix: colours are shares of a row, bars on the right the accuracy of each class (the diagonal).

    Args:
        matrix: (k, k) counts, rows true classes, columns predicted ones, as
            `torchmetrics.functional.classification.multiclass_confusion_matrix` returns them.
        class_names: k names.
        ax: where to draw.

    Up to 20 classes the counts are written in the cells; beyond, tick labels are thinned.

    Raises:
        ValueError: a matrix that is not square, or another number of names.
    """
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"a confusion matrix is (k, k), got shape {counts.shape}")
    classes = len(counts)
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for a confusion matrix of {classes} classes")
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    numbered = classes <= _MAX_NUMBERED
    if ax is None:
        side = min(9.0, max(3.0, 0.52 * classes))
        ax = _new_axes(side + 2.2, side + 1.0)

    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    shown = _thinned(classes, 25)
    texts = [_shortened(str(class_names[i]), 16) for i in shown]
    font = 9 if classes <= 12 else 7.5
    ax.set_yticks(shown, texts, fontsize=font)
    cell = _points(ax, classes, classes)
    upright = max(map(len, texts)) * 0.62 * font < 0.95 * cell * (shown[1] if len(shown) > 1 else 1)
    ax.set_xticks(
        shown,
        texts,
        fontsize=font,
        rotation=0 if upright else 45,
        ha="center" if upright else "right",
        rotation_mode="anchor",
    )
    ax.set(xlabel="predicted", ylabel="true")
    if numbered:
        widest = max(len(f"{count:.0f}") for count in counts.flat)
        size = min(9.0, 1.45 * cell / max(widest, 4))
        for (i, j), count in np.ndenumerate(counts):
            if count:  # most cells are empty, and zeros would hide the others
                ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=size, color=_ink(shares[i, j], 0.5))
    overall = np.trace(counts) / max(totals.sum(), 1)
    ax.set_title(f"accuracy {overall:.1%}", fontsize=11)
    _accuracy_bars(ax, shares.diagonal(), totals, numbered)
    if not numbered:
        bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.17, 0.0, 0.03, 1.0)))
        bar.set_label("share of the true class")
    return ax


def _accuracy_bars(ax: Axes, accuracy: np.ndarray, totals: np.ndarray, numbered: bool) -> None:
    classes = len(accuracy)
    bars = ax.inset_axes((1.02, 0.0, 0.12, 1.0))
    bars.barh(np.arange(classes), accuracy, height=0.8 if numbered else 1.0, color="tab:blue", alpha=0.45)
    bars.set(xlim=(0, 1), ylim=(classes - 0.5, -0.5), yticks=[], xticks=[0, 1])
    bars.set_xticklabels(["0", "1"], fontsize=7)
    bars.set_title("per class", fontsize=8, loc="left")
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)
    if numbered:
        for index, value in enumerate(accuracy):
            text = f"{value:.0%}" if totals[index] else "–"
            bars.text(1.08, index, text, va="center", ha="left", fontsize=8 if classes <= 12 else 7)


# Losses.


def plot_losses(
    losses: Sequence[str | Loss] = ("perceptron", "hinge", "squared_hinge"), ax: Axes | None = None
) -> Axes:
    """Losses of a sample with one rival against the score difference z_true − z_rival (logistic: the score of y = 1).

    Args:
        losses: names or loss objects.
        ax: where to draw.

    Raises:
        ValueError: an unknown name.
    """
    made = [LOSS_REGISTRY.make(loss) for loss in losses]
    if ax is None:
        ax = _new_axes(6.0, 4.0)
    difference = torch.linspace(-2.0, 3.0, 501, dtype=torch.float64)
    for index, loss in enumerate(made):
        single = loss.outputs(2) == 1
        scores = difference.unsqueeze(1) if single else torch.stack((difference, torch.zeros_like(difference)), 1)
        target = torch.full((len(difference),), int(single))
        with torch.no_grad():
            value = loss.value(scores, target)
        # Thinner and thinner, so that losses which coincide on a stretch all stay visible.
        width = 2.0 + 2.5 * (len(made) - 1 - index) / max(len(made) - 1, 1)
        ax.plot(difference.numpy(), value.numpy(), label=loss.name.replace("_", " "), linewidth=width)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set(xlabel="score of the true class − score of the rival", ylabel="loss", xlim=(-2, 3))
    ax.set_ylim(bottom=-0.15)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, loc="upper right")
    return ax


def save(ax: Axes, path: str | os.PathLike[str]) -> Path:
    """Write the figure of `ax` as a PNG of 150 dpi, trimmed to what is drawn; the file replaces an old one whole.

    The figure stays open: whoever made it closes it (`plt.close(ax.figure)`).
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; there is nothing for the user to mend.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        ax.figure.canvas.print_figure(content, format="png", dpi=150, bbox_inches="tight")
    replace_file(Path(path), content.getvalue())
    return Path(path)


def close(ax: Axes) -> None:
    """Close the figure of `ax`, which pyplot would otherwise keep."""
    import matplotlib.pyplot as plt

    plt.close(ax.get_figure(root=True))


# What they share.


def _new_axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt  # here, because pyplot settles on a backend

    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _scale(values: np.ndarray) -> float:
    """max|values|, or 1 where nothing finite and non-zero is there to scale by."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest if math.isfinite(largest) and largest > 0 else 1.0


def _ink(share: float, dark_from: float) -> str:
    return "white" if share > dark_from else "black"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= max(2, length) else f"{text[: max(2, length) - 1]}…"


def _thinned(count: int, most: int) -> list[int]:
    """Evenly spaced indices below `count`, at most `most` of them."""
    return list(range(0, count, math.ceil(count / most)))
