# %% [markdown]
# # The worked numbers of the chapter, recomputed
#
# Every number the textbook chapter on linear classifiers works out by hand is computed here again with torchlin, and
# printed beside the chapter's own: `what | chapter | computed | agrees`. The figures go into a folder.
#
#     python scripts/chapter.py [--out DIR]        # default: a folder `chapter` under the working directory
#
# The file opens as a notebook (cells start with `# %%`). It ends with an error if a row that should agree does not.
#
# The textbook writes samples as columns of X, (p, n); torchlin writes them as rows, (n, p), as PyTorch does.

# %%
from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from torchlin import (
    L1,
    L2,
    LinearHead,
    LogisticLoss,
    Penalty,
    PerceptronLoss,
    SoftmaxLoss,
    absorb_bias,
    append_one,
    apply_penalty,
    functional,
    gradient_descent,
    report,
)
from torchlin.data import DigitsDataModule

parser = argparse.ArgumentParser(description="Recompute the worked numbers of the chapter with torchlin.")
parser.add_argument("--out", type=Path, default=Path("chapter"), metavar="DIR", help="where the figures go")
OUT: Path = parser.parse_known_args()[0].out  # a notebook's kernel has arguments of its own
OUT.mkdir(parents=True, exist_ok=True)

if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(encoding="utf-8")  # a pipe on Windows has no ∇ otherwise

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is small: waking a second thread costs more than it brings
torch.set_default_dtype(torch.float64)  # so that what differs is the mathematics and not the rounding

# %% [markdown]
# ## The table


# %%
class Row(NamedTuple):
    what: str
    chapter: str
    computed: str
    agrees: str


ROWS: list[Row] = []
WIDTHS = (54, 25, 50, 8)


def show(*cells: str) -> None:
    print(" | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip())


def section(title: str) -> None:
    print(f"\n-- {title} ".ljust(sum(WIDTHS) + 10, "-"))


def add(what: str, chapter: str, computed: str, agrees: bool, misprint: bool = False) -> None:
    verdict = "NO" if not agrees else "misprint" if misprint else "yes"
    ROWS.append(Row(what, chapter, computed, verdict))
    show(*ROWS[-1])


def written(value: Tensor | float, digits: int = 5) -> str:
    """A tensor as text: (a, b, …), each number with `digits` significant digits."""
    flat = torch.as_tensor(value).detach().flatten().tolist()
    texts = [f"{number + 0.0:.{digits}g}" for number in flat]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def rounds_to(value: Tensor | float, printed: str) -> bool:
    """Whether the numbers, rounded to as many decimals as the chapter prints, are the printed ones.

    Whole numbers are taken as exact.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", printed.replace("−", "-"))
    decimals = max(len(number.partition(".")[2]) for number in numbers)
    tolerance = 0.5 * 10**-decimals + 1e-9 if decimals else 1e-5
    flat = torch.as_tensor(value).detach().flatten()
    return len(numbers) == len(flat) and bool(
        ((flat - torch.tensor([float(n) for n in numbers])).abs() <= tolerance).all()
    )


def compare(what: str, printed: str, value: Tensor | float) -> None:
    """A row for a number the chapter prints."""
    add(what, printed, written(value), rounds_to(value, printed))


def misprint(what: str, printed: str, right: str, value: Tensor | float) -> None:
    """A row for a number the chapter prints wrong: the computed one must be the right one, and not the printed one."""
    agrees = rounds_to(value, right) and not rounds_to(value, printed)
    add(what, printed, f"{written(value)}: {right} is right", agrees, misprint=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors have one shape and the same numbers, up to rounding."""
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def shape(t: Tensor) -> str:
    return f"({', '.join(str(size) for size in t.shape)}{',' if t.dim() == 1 else ''})"


def new_axes(width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


show(*Row._fields)
print("-" * (sum(WIDTHS) + 9))

# %% [markdown]
# ## Raw scores: z = Wx + b, and the bias trick

# %%
section("raw scores")
CLASSES = ("lion", "tiger", "leopard")
x = torch.tensor([[26.0, 100.0, 90.0, 80.0]])
head = LinearHead(in_features=4, num_classes=3)
with torch.no_grad():
    head.weight.copy_(torch.tensor([[0.1, -0.1, 0.0, 0.5], [2.3, 0.8, 1.2, 0.5], [0.0, -1.0, 0.5, 1.0]]))
    scores = head(x)
    winner = int(head.predict(x))
    compare("largest raw score of x = (26, 100, 90, 80), b = 0", "287.8", scores.max())
    add(
        "its class",
        "2 (tiger)",
        f"{winner + 1} ({CLASSES[winner]})",
        f"{winner + 1} ({CLASSES[winner]})" == "2 (tiger)",
    )

    extended = absorb_bias(head)
    compare("the same through the bias trick, [W b][x; 1]", "287.8", extended(append_one(x)).max())
    head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    trick = absorb_bias(head)(append_one(x))
    add("and with b = (1, −2, 3)", "Wx + b", f"{written(trick)} and {written(head(x))}", close(trick, head(x)))

# %% [markdown]
# ## Perceptron and hinge loss

# %%
section("perceptron and hinge loss of three samples, true classes lion, tiger, leopard")
Z = torch.tensor([[5.6, 6.4, -4.6], [-1.8, 10.2, 3.5], [2.0, 5.4, -8.6]])
y = torch.tensor([0, 1, 2])
compare("perceptron losses", "0.8, 0, 24.6", functional.perceptron_loss(Z, y, reduction="none"))
compare("their mean (8.47 in two decimals)", "8.5", functional.perceptron_loss(Z, y))
compare("hinge losses, margin 1", "1.8, 0, 26.6", functional.hinge_loss(Z, y, reduction="none"))
compare("their mean", "9.47", functional.hinge_loss(Z, y))

ax = report.plot_losses(("perceptron", "hinge", "squared_hinge"))
report.save(ax, OUT / "losses.png")

# %% [markdown]
# ## Softmax and its loss

# %%
section("softmax")
probabilities = SoftmaxLoss().probabilities(Z[0])
compare("softmax of (5.6, 6.4, −4.6)", "0.31, 0.69, 0.00", probabilities)
misprint("probability of lion, as the text then quotes it", "0.39", "0.31", probabilities[0])
loss = functional.softmax_loss(Z[0], y[0])
add(
    "softmax loss of that sample, true class lion", "−log 0.31", written(loss), round(math.exp(-float(loss)), 2) == 0.31
)

# Scores (log p, 0) give the true class a probability of about p.
for exponent in (1, 10, 100, 1_000, 10_000):
    z = torch.tensor([[-float(exponent), 0.0]], requires_grad=True)
    value = functional.softmax_loss(z, torch.tensor([0]))
    (slope,) = torch.autograd.grad(value, z)
    with torch.no_grad():
        naive = -torch.log(SoftmaxLoss().probabilities(z)[0, 0])
    expected = exponent + math.log1p(math.exp(-exponent))  # −log of e⁻ⁿ/(1 + e⁻ⁿ)
    loss_there = float(value.detach())
    right = math.isclose(loss_there, expected, rel_tol=1e-12) and bool(slope.isfinite().all())
    text = f"{loss_there:.10g} (p first, then its log: {float(naive):.6g})"
    add(f"−log p at p = e^−{exponent} / (1 + e^−{exponent})", "finite; grows as p → 0", text, right)

ax = new_axes(6.0, 4.0)
lead = torch.linspace(-7.0, 7.0, 400)
with torch.no_grad():
    two = torch.stack((lead, torch.zeros_like(lead)), 1)
    curve = functional.softmax_loss(two, torch.zeros(len(lead), dtype=torch.int64), reduction="none")
    ax.plot(SoftmaxLoss().probabilities(two)[:, 0], curve, linewidth=2)
ax.plot(float(probabilities[0]), float(loss), "o", color="tab:red")
ax.annotate(
    f"lion: p = {float(probabilities[0]):.2f}, loss = {float(loss):.2f}",
    (float(probabilities[0]), float(loss)),
    xytext=(14, 14),
    textcoords="offset points",
)
ax.set(xlabel="p, the probability of the true class", ylabel="−log p", xlim=(0, 1), ylim=(0, 7))
ax.grid(alpha=0.25)
report.save(ax, OUT / "log_loss.png")

# %% [markdown]
# ## Derivatives in one dimension
#
# Each formula of the chapter beside what automatic differentiation gives, at several points.

# %%
POINTS = torch.tensor([0.5, 1.0, 2.0, 3.0])
LINE = torch.tensor([-2.0, -0.5, 0.5, 3.0])
Map = Callable[[Tensor], Tensor]


def derivative(name: str, formula: str, f: Map, by_hand: Map, at: Tensor = LINE) -> None:
    """A row: the formula, evaluated at every point, against autograd of f."""
    w = at.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(f(w).sum(), w)
    computed = f"{written(automatic, 3)} {shape(automatic)}"
    add(f"d/dw {name} at w = {written(at, 3)}", formula, computed, close(by_hand(at).expand_as(at), automatic))


def sigmoid(t: Tensor) -> Tensor:
    """1/(1 + e⁻ᵗ), as the logistic loss has it: the probability of y = 1."""
    return LogisticLoss().probabilities(t)[..., 1]


def chain_rule(t: Tensor) -> Tensor:
    """The textbook's way through t → −t → e⁻ᵗ → 1 + e⁻ᵗ → 1/(1 + e⁻ᵗ): the four slopes multiplied."""
    exponential = torch.exp(-t)
    return -1 / (1 + exponential) ** 2 * 1 * exponential * -1


section("derivatives in one dimension, by formula and by autograd")
a = 4.0
derivative("a", "0", lambda w: 0 * w + a, torch.zeros_like)
derivative("aw (a = 4)", "a", lambda w: a * w, lambda w: torch.full_like(w, a))
derivative("w²", "2w", lambda w: w**2, L2(1.0).gradient)
derivative("wⁿ (n = 5)", "n wⁿ⁻¹", lambda w: w**5, lambda w: 5 * w**4)
derivative("e^w", "e^w", torch.exp, torch.exp)
derivative("e^−w", "−e^−w", lambda w: torch.exp(-w), lambda w: -torch.exp(-w))
derivative("log w", "1/w", torch.log, lambda w: 1 / w, POINTS)
derivative("1/w", "−1/w²", lambda w: 1 / w, lambda w: -1 / w**2)
derivative("(w² + 5 log w + 6)", "2w + 5/w", lambda w: w**2 + 5 * torch.log(w) + 6, lambda w: 2 * w + 5 / w, POINTS)
derivative("1/(1+e^−w), chain rule", "e^−w/(1 + e^−w)²", sigmoid, chain_rule)
derivative("1/(1+e^−w)", "σ(1 − σ)", sigmoid, lambda w: sigmoid(w) * (1 - sigmoid(w)))

w = torch.tensor(2.0, requires_grad=True)
(sensitivity,) = torch.autograd.grad(w**2 + 3, w)
compare("sensitivity of w² + 3 at w = 2", "4", sensitivity)
nudged = ((2 + 1e-6) ** 2 + 3 - (2**2 + 3)) / 1e-6
add("the same by moving w by 0.000001", "about 4", written(nudged, 8), abs(nudged - 4) < 1e-4)

# %% [markdown]
# ### The computation graph of 1/(1 + e⁻ʷ)
#
# Forward values from left to right, derivatives of the output from right to left: each is the one to its right times
# the slope of the step between them.


# %%
class Node(NamedTuple):
    label: str
    value: Tensor


section("the computation graph of 1/(1 + e^−w) at w = 1")
w = torch.tensor(1.0, requires_grad=True)
u = -w
v = torch.exp(u)
s = 1 + v
p = 1 / s
nodes = [Node("w", w), Node("u = −w", u), Node("v = eᵘ", v), Node("s = 1 + v", s), Node("p = 1/s", p)]
steps = ("× (−1)", "exp", "+ 1", "1/·")
slopes = [-1.0, v.item(), 1.0, (-1 / s**2).item()]  # du/dw, dv/du, ds/dv, dp/ds
backward = [1.0]
for slope_of_step in reversed(slopes):
    backward.insert(0, backward[0] * slope_of_step)
derivatives = torch.autograd.grad(p, [node.value for node in nodes])
for node, derivative_by_hand, by_autograd in zip(nodes, backward, derivatives, strict=True):
    add(
        f"dp/d{node.label[0]} by the chain rule",
        "slopes multiplied",
        f"{derivative_by_hand:.5f}, autograd {float(by_autograd):.5f} ({node.label} = {node.value.item():.4f})",
        math.isclose(derivative_by_hand, float(by_autograd), rel_tol=1e-12),
    )
add("p itself, by the logistic loss", "1/(1 + e^−1)", written(sigmoid(w)), close(p, sigmoid(w)))

ax = new_axes(9.5, 2.7)
ax.set(xlim=(-0.6, 4.6), ylim=(-0.75, 0.8))
ax.set_axis_off()
for position, (node, derivative_by_hand) in enumerate(zip(nodes, backward, strict=True)):
    ax.add_patch(
        FancyBboxPatch((position - 0.27, -0.13), 0.54, 0.26, boxstyle="round,pad=0.04", fc="#eef3fa", ec="0.3")
    )
    ax.text(position, 0, node.label, ha="center", va="center", fontsize=12)
    ax.text(position, 0.27, f"{node.value.item():.3f}", ha="center", va="bottom", color="tab:green", fontsize=12)
    ax.text(position, -0.27, f"{derivative_by_hand:.3f}", ha="center", va="top", color="tab:red", fontsize=12)
for position, (step, slope_of_step) in enumerate(zip(steps, slopes, strict=True)):
    ax.annotate(
        "", (position + 0.67, 0.06), (position + 0.33, 0.06), arrowprops={"arrowstyle": "->", "color": "tab:green"}
    )
    ax.annotate(
        "", (position + 0.33, -0.06), (position + 0.67, -0.06), arrowprops={"arrowstyle": "->", "color": "tab:red"}
    )
    ax.text(position + 0.5, 0.12, step, ha="center", va="bottom", fontsize=10, color="tab:green")
    ax.text(position + 0.5, -0.12, f"× {slope_of_step:.3f}", ha="center", va="top", fontsize=10, color="tab:red")
ax.text(2, 0.62, "forward: values", ha="center", color="tab:green", fontsize=11)
ax.text(2, -0.62, "backward: derivative of p, times the slope of each step", ha="center", color="tab:red", fontsize=11)
report.save(ax, OUT / "computation_graph.png")

# %% [markdown]
# ## Derivatives with respect to vectors
#
# A derivative of a scalar has the shape of what it is taken by; that of a vector is its Jacobian.

# %%
section("derivatives with respect to vectors, with shapes")


def bowl(w: Tensor) -> Tensor:
    """(w₁ − 2)² + (w₂ + 3)²."""
    return (w[..., 0] - 2) ** 2 + (w[..., 1] + 3) ** 2


def vector_derivative(name: str, formula: str, f: Map, by_hand: Tensor, at: Tensor) -> None:
    automatic = torch.autograd.functional.jacobian(f, at)
    add(name, formula, f"{written(automatic, 3)}, shape {shape(automatic)}", close(by_hand, automatic))


w3, x3 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 1.0, -1.0])
vector_derivative("∇w wᵀw, w = (1, −2, 0.5)", "2w", lambda w: w @ w, L2(1.0).gradient(w3), w3)
vector_derivative("∇w xᵀw, x = (2, 1, −1)", "x", lambda w: x3 @ w, x3, w3)
w2 = torch.tensor([1.0, 1.0])
vector_derivative(
    "∇w (w₁−2)² + (w₂+3)², w = (1, 1)", "2(w₁−2), 2(w₂+3)", bowl, 2 * (w2 - torch.tensor([2.0, -3.0])), w2
)
second = torch.autograd.functional.jacobian(bowl, w2)[1]
ratio = float(second / (w2[1] + 3))
add(
    "its second entry, as the chapter writes it",
    "3(w₂+3)",
    f"{written(second)} = {written(ratio)}(w₂+3): 2(w₂+3) is right",
    math.isclose(ratio, 2) and not math.isclose(float(second), 3 * (float(w2[1]) + 3)),
    misprint=True,
)
matrix = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
vector_derivative("∂(Wz)/∂z, W = (1, 2, 3; 4, 5, 6)", "W", lambda z: matrix @ z, matrix, w3)
at = sigmoid(w3 @ x3)
vector_derivative("∇w 1/(1 + e^(−wᵀx))", "σ(1 − σ) x", lambda w: sigmoid(w @ x3), at * (1 - at) * x3, w3)

# %% [markdown]
# ## Gradient descent
#
# w ← w − lr · ∇f(w), until the gradient or the change in w is small.

# %%
section("gradient descent, lr = 0.1, tol = 1e-6")


def parabola(w: Tensor) -> Tensor:
    return w**2 + 3


line = gradient_descent(parabola, 2.0, lr=0.1, tol=1e-6)
plane = gradient_descent(bowl, torch.tensor([-3.0, 2.0]), lr=0.1, tol=1e-6)
step_by_hand = torch.tensor(2 - 0.1 * (2 * 2))
add("first step on w² + 3 from w = 2", "w − lr · 2w", written(line.points[1]), close(line.points[1], step_by_hand))
compare("where w² + 3 ends", "0", line.solution)
compare("and its value there", "3", line.values[-1])
compare("where (w₁−2)² + (w₂+3)² ends, from (−3, 2)", "2, −3", plane.solution)
compare("and its value there", "0", plane.values[-1])
for name, trace in (("w² + 3", line), ("(w₁−2)² + (w₂+3)²", plane)):
    downhill = bool((trace.values[1:] <= trace.values[:-1]).all())
    text = f"small {trace.stopped} after {len(trace.points) - 1} steps"
    add(f"why the descent on {name} ended", "gradient or change small", text, trace.converged and downhill)

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
grid = torch.linspace(-2.4, 2.4, 200)
left.plot(grid, parabola(grid), color="0.6")
left.plot(line.points, line.values, "o-", color="tab:red", markersize=4, linewidth=1)
left.annotate("start", (2, 7), xytext=(-34, 2), textcoords="offset points")
left.set(xlabel="w", ylabel="w² + 3", title=f"w² + 3 from 2: {len(line.points) - 1} steps, lr = 0.1")
across, up = torch.linspace(-4, 6, 120), torch.linspace(-7, 3, 120)
surface = bowl(torch.stack(torch.meshgrid(across, up, indexing="xy"), -1))
contours = right.contour(across, up, surface, levels=[0.5, 2, 5, 10, 20, 35, 55], colors="0.65", linewidths=0.8)
right.clabel(contours, fontsize=8)
right.plot(plane.points[:, 0], plane.points[:, 1], "o-", color="tab:red", markersize=4, linewidth=1)
right.plot(2, -3, "x", color="black", markersize=9)
right.annotate("start", (-3, 2), xytext=(6, 4), textcoords="offset points")
right.set(xlabel="w₁", ylabel="w₂", title=f"(w₁ − 2)² + (w₂ + 3)² from (−3, 2): {len(plane.points) - 1} steps")
right.set_aspect("equal")
report.save(left, OUT / "descent.png")

# %% [markdown]
# ## The gradient of a linear classifier
#
# On twenty real digits (p = 64 pixels): the textbook's formulas with samples as columns, torchlin's (1/n) GᵀX, the
# hand-written backward of the loss, and finite differences.

# %%
section("gradients of W on n = 20 digits")
data = DigitsDataModule()
data.setup()
train = data.train_dataloader()
pixels, labels = next(iter(train))
pixels, labels = pixels[:20], labels[:20]
X = pixels.flatten(1).double() / 255
columns, n = X.T, len(X)  # the textbook's X, (p, n)


def finite_differences(f: Callable[[], Tensor], w: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of f by every entry of w, which is moved in place and put back."""
    gradient, flat = torch.zeros_like(w), w.view(-1)
    for index in range(len(flat)):
        kept = float(flat[index])
        flat[index] = kept + step
        above = f()
        flat[index] = kept - step
        gradient.view(-1)[index] = (above - f()) / (2 * step)
        flat[index] = kept
    return gradient


def agreement(what: str, formula: str, reference: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    text = f"{shape(other)}, largest difference {float((reference - other).abs().max()):.0e}"
    add(what, formula, text, close(other, reference, tolerance))


softmax_head = LinearHead(data.in_features, data.num_classes, init="normal")
Zd = softmax_head(pixels)
functional.softmax_loss(Zd, labels).backward()
automatic = softmax_head.weight.grad
assert automatic is not None
with torch.no_grad():
    P = SoftmaxLoss().probabilities(Zd)
    adjusted = P - torch.nn.functional.one_hot(labels, data.num_classes)
    G = SoftmaxLoss().gradient(Zd, labels)
    agreement("P adjusted is the loss's gradient G", "P − 1 at the true class", adjusted, G)
    agreement("softmax: ∇W by the chapter, X (p, n)", "(1/n) P_adjusted Xᵀ", adjusted.T @ columns.T / n, automatic)
    agreement("softmax: ∇W in torchlin's words, X (n, p)", "(1/n) Gᵀ X", G.T @ X / n, automatic)
    numeric = finite_differences(lambda: functional.softmax_loss(softmax_head(pixels), labels), softmax_head.weight)
    agreement("softmax: by finite differences", "the same", automatic, numeric, 1e-6)

odd = labels % 2  # a question with two answers: is the digit odd?
logistic_head = LinearHead(data.in_features, 1, bias=False, init="normal")
functional.logistic_loss(logistic_head(pixels), odd).backward()
automatic = logistic_head.weight.grad
assert automatic is not None
with torch.no_grad():
    weights = logistic_head.weight[0]
    by_chapter = columns @ (sigmoid(columns.T @ weights) - odd) / n
    agreement("logistic: ∇w by the chapter, X (p, n)", "(1/n) X(σ(Xᵀw) − y)", by_chapter.unsqueeze(0), automatic)
    numeric = finite_differences(lambda: functional.logistic_loss(logistic_head(pixels), odd), logistic_head.weight)
    agreement("logistic: by finite differences", "the same", automatic, numeric, 1e-6)

    W = softmax_head.weight.detach()
agreement("∇W of the L2 penalty Σ w²", "2W", 2 * W, L2(1.0).gradient(W))
agreement("the same by autograd", "2W", 2 * W, torch.autograd.functional.jacobian(L2(1.0).value, W))
tie = PerceptronLoss().gradient(torch.zeros(1, 3), torch.tensor([0]))
add("perceptron at W = 0 (a tie is a violation)", "training leaves W = 0", f"∂L/∂z = {written(tie)}", bool(tie.any()))

# %% [markdown]
# ## One epoch
#
# Every training sample once, shuffled, in batches.

# %%
section("one epoch of digits")
size = data.sizes["train"]
in_order = torch.stack([train.dataset[i][0] for i in range(size)])
epochs = [list(train), list(train)]
first, again = (torch.cat([images for images, _ in batches]) for batches in epochs)


def contents(images: Tensor) -> Tensor:
    """The different images as rows in lexicographic order, and how often each is there: whatever order they come in."""
    rows, counts = torch.unique(images.flatten(1).int(), dim=0, return_counts=True)
    return torch.cat((rows, counts.unsqueeze(1)), 1)


sizes = [len(images) for images, _ in epochs[0]]
count = f"{len(sizes)} batches: {len(sizes) - 1} × {sizes[0]} + {sizes[-1]} = {sum(sizes)}"
batches_needed = math.ceil(size / data.batch_size)
add(
    f"{size} samples in batches of {data.batch_size}",
    "⌈n / batch⌉ batches",
    count,
    len(sizes) == batches_needed,
)
every = len(first) == len(in_order) and torch.equal(contents(first), contents(in_order))
distinct = f"{len(contents(first))} of {len(contents(in_order))} different images seen"
add("every sample once", "every sample once", distinct, every)
moved = int((first != in_order).flatten(1).any(1).sum())
add("shuffled", "in a new order", f"{moved} samples at another place", moved > 0.9 * len(first))
moved = int((first != again).flatten(1).any(1).sum())
add(
    "and differently in the next epoch", "in a new order", f"{moved} samples at another place", moved > 0.9 * len(first)
)

# %% [markdown]
# ## L1 leaves fewer weights than L2, at the same accuracy
#
# A softmax head for each of several λ; of those whose validation accuracy is within one sample in a hundred of the
# best, the strongest λ is taken, separately for L1 and L2. The test digits are looked at once, at the end.

# %%
section("L1 and L2 on digits")


class Trained(NamedTuple):
    penalty: Penalty
    head: LinearHead
    val_accuracy: float

    @property
    def nonzero(self) -> int:
        return int(self.head.weight.count_nonzero())


def accuracy(head: LinearHead, loader: Iterable[Any]) -> float:
    hits = torch.cat([head.predict(images) == targets for images, targets in loader])
    return float(hits.double().mean())


def train_head(penalty: Penalty, epochs: int = 100) -> Trained:
    """Plain SGD on the loss alone; the penalty is taken at every step, so that L1 gives exact zeros."""
    module = DigitsDataModule(batch_size=64)
    module.setup()
    loader = module.train_dataloader()
    head = LinearHead(module.in_features, module.num_classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
    apply_penalty(optimizer, head, penalty, window=len(loader))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for images, targets in loader:
            optimizer.zero_grad()
            functional.softmax_loss(head(images), targets, validate=False).backward()
            optimizer.step()
            schedule.step()
    return Trained(penalty, head, accuracy(head, module.val_dataloader()))


def strongest(penalty: type[L1] | type[L2], strengths: tuple[float, ...]) -> Trained:
    path = [train_head(penalty(strength)) for strength in strengths]
    best = max(trained.val_accuracy for trained in path)
    return max((t for t in path if t.val_accuracy >= best - 0.01), key=lambda t: t.penalty.strength)


lasso = strongest(L1, (5e-4, 1e-3, 2e-3, 4e-3))
ridge = strongest(L2, (5e-4, 1e-3, 2e-3, 4e-3))
total = lasso.head.weight.numel()
tested = [accuracy(trained.head, data.test_dataloader()) for trained in (lasso, ridge)]
for trained, test_accuracy in zip((lasso, ridge), tested, strict=True):
    name = f"{trained.penalty.name.upper()}, λ = {trained.penalty.strength:g}"
    text = f"{trained.nonzero} of {total}; {test_accuracy:.1%}"
    add(f"{name}: non-zero weights; test accuracy", "a good classifier", text, test_accuracy > 0.93)
same = abs(tested[0] - tested[1])
add("L1 leaves fewer non-zero weights", "fewer", f"{lasso.nonzero} < {ridge.nonzero}", lasso.nonzero < ridge.nonzero)
add("at the same accuracy", "the same", f"{100 * same:.1f} points apart", same <= 0.015)

figure, grid_of_axes = plt.subplots(2, 2, figsize=(12.5, 6.4), layout="constrained")
for (left, right), trained, test_accuracy in zip(grid_of_axes, (lasso, ridge), tested, strict=True):
    report.plot_templates(trained.head, data.class_names, (1, 8, 8), ax=left)
    name = f"{trained.penalty.name.upper()}, λ = {trained.penalty.strength:g}"
    left.set_title(f"{name}: test accuracy {test_accuracy:.1%}", fontsize=11)
    support = LinearHead(data.in_features, data.num_classes)
    with torch.no_grad():
        support.weight.copy_(trained.head.weight != 0)
    report.plot_templates(support, data.class_names, (1, 8, 8), ax=right)
    right.set_title(f"where W is not zero: {trained.nonzero} of {total} weights", fontsize=11)
report.save(left, OUT / "l1_l2_digits.png")

# %% [markdown]
# ## The end

# %%
plt.close("all")
wrong = [row for row in ROWS if row.agrees == "NO"]
misprints = [row for row in ROWS if row.agrees == "misprint"]
print(
    f"\n{len(ROWS)} rows: {len(ROWS) - len(wrong) - len(misprints)} agree, {len(misprints)} misprints of the chapter, "
    f"{len(wrong)} disagree."
)
for row in misprints:
    print(f"  misprint: {row.what}: the chapter says {row.chapter}; computed {row.computed}")
print(f"Figures: {', '.join(sorted(path.name for path in OUT.glob('*.png')))} in {OUT}")
if wrong:
    raise SystemExit(f"{len(wrong)} rows do not agree: {'; '.join(row.what for row in wrong)}")
