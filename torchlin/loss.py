"""What every loss shares: shapes, dtypes, class weights, ignored samples, averaging, and the way to autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchlin.autograd import row_values
from torchlin.registry import options_of

Reduction = Literal["none", "mean", "sum"]

# Rows are handled in blocks of about this many scores on a CPU: the block then stays in the cache between two
# operations on it, and no temporary is as large as the scores.
_BLOCK = 1 << 16


class Encoded(NamedTuple):
    """A target as the mathematics wants it: `target` for `value` and `gradient`, the coefficient c_i of each sample in
    the sum (None: all one) and its share in the denominator of the mean (None: all one)."""

    target: Tensor
    coefficient: Tensor | None
    normaliser: Tensor | None


class Total(NamedTuple):
    """A loss summed over samples.

    Attributes:
        loss: Σ c_i L_i, differentiable, ().
        weight: N, the denominator of the mean; a number where no tensor had to be read to know it.
        counting: how many samples count; likewise.
    """

    loss: Tensor
    weight: Tensor | int
    counting: Tensor | int


def reduce(values: Tensor, normaliser: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """The one place where losses are averaged: Σ values / Σ normaliser, or the sum, or nothing.

    Args:
        values: c_i L_i, any shape; samples that do not count are 0 in it.
        normaliser: what each sample adds to the denominator N (its class weight; 0 if ignored); None means 1 each.
        reduction: "none", "mean" or "sum".

    A batch with nothing to average (no samples, or N = 0) has mean 0 with zero gradients.
    """
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if normaliser is None:
        return values.mean() if values.numel() else values.sum()
    total = normaliser.sum()
    return values.sum() / torch.where(total > 0, total, 1)


class Loss(nn.Module):
    """Base of the losses.

    Args:
        weight: one non-negative weight per class, (num_classes,); sample i then counts w_{y_i} times.
        ignore_index: samples with this target do not count.
        reduction: "mean" is Σ w_y L / Σ w_y over the samples that count, as in `torch.nn.CrossEntropyLoss`;
            "sum"; or "none", which returns w_y L per sample.
        validate: check target values in eager mode (one synchronisation on a GPU). Shapes and dtypes are always
            checked; values are not under `torch.compile`, `torch.func` transforms and CUDA graph capture.

    Shapes: scores (k,), (n, k) or (n, k, d1, …) with target (), (n,) or (n, d1, …) of any integer dtype, as
    `CrossEntropyLoss` takes them. Half precision scores are computed in float32 and the loss is float32.

    Raises:
        ValueError: shapes that do not fit, a target out of range, a bad option.
        TypeError: a target that is not integers, scores that are not floating point.
    """

    name: ClassVar[str]
    also_called: ClassVar[tuple[str, ...]] = ()
    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
        if weight is not None:
            weight = torch.as_tensor(weight)
            if not weight.is_floating_point():
                weight = weight.float()
            if weight.dim() != 1:
                raise ValueError(f"weight holds one number per class, (num_classes,), got shape {tuple(weight.shape)}")
            if weight.requires_grad:
                raise ValueError("weight requires grad, but no gradient is computed for class weights: detach it")
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.validate = validate
        if weight is not None and not tracing() and not bool((weight >= 0).all() and weight.isfinite().all()):
            raise ValueError(f"class weights are finite and not negative, got {weight.tolist()}")

    # The mathematics.

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        """L, (n,)."""
        raise NotImplementedError

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        """G = ∂L/∂Z, (n, k), a new tensor (the caller may scale it in place)."""
        raise NotImplementedError

    def value_and_gradient(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, for a loss in which they share work."""
        return self.value(scores, target), self.gradient(scores, target)

    def hessian_product(self, scores: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        """Row i: (∂²L_i/∂z_i²) vector_i, (n, k). Zero for a piecewise linear loss: right away from its kinks."""
        return torch.zeros_like(vector)

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        """−L*(g) per row, (n,), for score gradients of dual-feasible form (as `gradient` yields them).

        L(z) ≥ ⟨z, g⟩ − L*(g) for every z, with equality where g is the gradient at z (Fenchel–Young).
        """
        raise NotImplementedError(f"the {self.name} loss declares no dual")

    def probabilities(self, scores: Tensor) -> Tensor:
        """Class probabilities, (n, num_classes), where the loss has a probabilistic model."""
        raise TypeError(
            f"the {self.name} loss defines no probabilities; use the scores, or train with softmax or logistic"
        )

    def predict(self, scores: Tensor) -> Tensor:
        """The class that the scores (n, outputs) speak for, (n,): the one with the largest."""
        return scores.argmax(-1)

    def sample_weights(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """w_y of each sample, 0 where it is ignored, and whether it counts: two tensors (n,).

        The sum of the first is the N of a mean.
        """
        counts = target != self.ignore_index
        if self.weight is None:
            return counts.float(), counts
        return self.weight[torch.where(counts, target.long(), 0)] * counts, counts

    def smoothness(self, num_classes: int) -> float | None:
        """Lipschitz constant of ∂L/∂z in the Euclidean norm; None where the gradient jumps."""
        return None

    def curvature(self, num_classes: int) -> float:
        """What a step length should reckon with: the smoothness, or for a loss with corners that of the same loss with
        its corners rounded over a unit of score."""
        return self.smoothness(num_classes) or num_classes / 2

    @classmethod
    def outputs(cls, num_classes: int) -> int:
        """How many scores a head needs for `num_classes` classes."""
        return num_classes

    @classmethod
    def classes(cls, outputs: int) -> int:
        """How many classes `outputs` scores stand for: the inverse of `outputs`."""
        return outputs

    # What every loss shares.

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        shape = drop_classes(scores) if target.is_floating_point() else target.shape
        rows, row_target = self._rows(scores, target)
        encoded = self.encode(rows, row_target)
        values = row_values(rows, encoded.target, encoded.coefficient, self)
        if self.reduction == "none":
            return values.view(shape)
        return reduce(values, encoded.normaliser, self.reduction)

    def total(self, scores: Tensor, target: Tensor, *, all_count: bool = False) -> Total:
        """The sum and what to divide it by, apart: for a mean over more samples than are at hand at a time.

        Takes and raises what calling the loss does; `reduction` does not matter.

        Args:
            scores: see the class.
            target: see the class.
            all_count: the targets are known to be classes, none of them ignored; they are then not looked at.
        """
        rows, row_target = self._rows(scores, target)
        encoded, weight, counting = self.prepare(rows, row_target, all_count=all_count)
        return Total(row_values(rows, encoded.target, encoded.coefficient, self).sum(), weight, counting)

    def prepare(
        self, scores: Tensor, target: Tensor, *, all_count: bool = False
    ) -> tuple[Encoded, Tensor | int, Tensor | int]:
        """The encoded target, and `weight` and `counting` of a `Total`. Scores (n, k), target (n,)."""
        encoded = self.encode(scores, target, all_count=all_count)
        weight = len(scores) if encoded.normaliser is None else encoded.normaliser.sum()
        counting: Tensor | int = len(scores)
        if not all_count and encoded.coefficient is not None and not target.is_floating_point():
            counting = (target != self.ignore_index).sum().to(scores.dtype)
        return encoded, weight, counting

    def encode(self, scores: Tensor, target: Tensor, *, all_count: bool = False) -> Encoded:
        """Targets as `value` wants them, and what each sample counts. Scores (n, k), target (n,) integers."""
        target, counts = self._class_indices(scores, target, all_count)
        coefficient = None if counts is None else counts.to(scores.dtype)
        if self.weight is not None:
            chosen = self.weight.to(scores)[target]
            coefficient = chosen if coefficient is None else chosen * coefficient
        return Encoded(target, coefficient, coefficient)

    def _class_indices(self, scores: Tensor, target: Tensor, all_count: bool) -> tuple[Tensor, Tensor | None]:
        """int64 targets with 0 for the ignored ones, and which count (None if surely all do)."""
        target = target.long()
        classes = self.classes(scores.shape[1])
        if self.weight is not None and self.weight.shape[0] != classes:
            raise ValueError(f"weight has {self.weight.shape[0]} entries for {classes} classes")
        if all_count:
            return target, None
        if self.validate and not tracing():
            if target.numel() == 0:
                return target, None
            low, high = (int(v) for v in torch.aminmax(target))
            in_range = low >= 0 and high < classes
            if not in_range:
                valid = ((target >= 0) & (target < classes)) | (target == self.ignore_index)
                if not bool(valid.all()):
                    bad = int((~valid).nonzero()[0])
                    raise ValueError(
                        f"target[{bad}] = {int(target[bad])} is not a class: with scores for {classes} classes targets "
                        f"are 0 … {classes - 1}, or ignore_index={self.ignore_index}"
                    )
            if in_range and not low <= self.ignore_index <= high:
                return target, None
        counts = target != self.ignore_index
        return torch.where(counts, target, 0), counts

    def _rows(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, k) in float32 or float64, target (n,) or (n, k), after the checks of shape and dtype."""
        self._check_dtypes(scores, target)
        if scores.dim() == 0:
            raise ValueError("scores have no class dimension: expected (k,), (n, k) or (n, k, d1, …), got a number")
        if drop_classes(scores) != target.shape:
            raise ValueError(
                f"scores {tuple(scores.shape)} and target {tuple(target.shape)} do not fit: "
                f"scores (n, k) go with target (n,), so target should be {tuple(drop_classes(scores))}"
            )
        if scores.dim() > 2:
            scores, target = scores.movedim(1, -1).flatten(0, -2), target.flatten()
        elif scores.dim() == 1:
            scores, target = scores.unsqueeze(0), target.unsqueeze(0)
        return full_precision(scores), target

    def _check_dtypes(self, scores: Tensor, target: Tensor) -> None:
        if not scores.is_floating_point():
            raise TypeError(f"scores are floating point, got {scores.dtype}")
        if target.is_floating_point() or target.is_complex():
            raise TypeError(
                f"the {self.name} loss takes class indices (an integer dtype) as target, got {target.dtype}: "
                "use target.long()"
            )

    def extra_repr(self) -> str:
        if torch.compiler.is_compiling():
            return ""  # `torch.func.vmap` takes the repr of what it maps, and a graph cannot read the class weights
        return ", ".join(f"{key}={value}" for key, value in options_of(self).items())


def drop_classes(scores: Tensor) -> torch.Size:
    """The shape of class indices for scores (k,), (n, k) or (n, k, d1, …)."""
    return scores.shape[:1] + scores.shape[2:] if scores.dim() > 1 else scores.shape[:0]


def full_precision(scores: Tensor) -> Tensor:
    """float32 for half types; float32 and float64 as they are."""
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def tracing() -> bool:
    """Whether values cannot be looked at: compile, a torch.func transform, or CUDA graph capture."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def blocked(rows: Callable[..., Tensor], scores: Tensor, target: Tensor, *options: object) -> Tensor:
    """rows(scores, target, *options) over blocks of rows that fit the cache of a CPU."""
    step = max(1, _BLOCK // max(1, scores.shape[1]))
    if len(scores) <= step or scores.device.type != "cpu" or torch.compiler.is_compiling():
        return rows(scores, target, *options)
    first = rows(scores[:step], target[:step], *options)
    out = first.new_empty((len(scores), *first.shape[1:]))
    out[:step] = first
    for start in range(step, len(scores), step):
        block = slice(start, start + step)
        out[block] = rows(scores[block], target[block], *options)
    return out
