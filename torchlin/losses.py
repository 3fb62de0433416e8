"""The losses: one class each, whose methods are its mathematics on rows of scores.

`value`, `gradient`, `hessian_product` and `dual` see scores Z (n, k) in float32 or float64 and targets that are all
valid; everything else is written once, in `Loss`. A loss of your own is a subclass with `name`, `value` and `gradient`;
it then works as a module and in `LinearClassifier`.

Throughout, d_j = z_j − z_y is the lead of rival j over the true class y, and Δ is the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin.loss import Encoded, Loss, Reduction, blocked, full_precision, reduce
from torchlin.registry import Registry

__all__ = [
    "LOSSES",
    "LOSS_REGISTRY",
    "CrammerSingerLoss",
    "HingeLoss",
    "LogisticLoss",
    "Loss",
    "PerceptronLoss",
    "SoftmaxLoss",
    "SquaredHingeLoss",
    "reduce",
]


class _MarginLoss(Loss):
    """What the multiclass hinge family shares: a margin."""

    def __init__(
        self,
        *,
        margin: float = 1.0,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate: bool = True,
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction, validate=validate)
        if not (math.isfinite(margin) and margin > 0):
            raise ValueError(f"margin is a positive number, got {margin}")
        self.margin = float(margin)

    def project_rivals(self, rivals: Tensor) -> Tensor:
        """The nearest dual-feasible rivals, row by row and in place, (n, k).

        L(z) = max over feasible q ≥ 0 of Σ q_j (d_j + Δ), column y of q being 0 (−∞ in the argument): the set is
        q ≤ 1 for the hinge loss and Σ q ≤ 1 for that of Crammer and Singer.
        """
        raise NotImplementedError(f"the {self.name} loss is smooth: its dual set has no bound to project on")


class PerceptronLoss(Loss):
    """Multiclass perceptron loss: every rival that is not beaten adds its lead.

    Value:     L = Σ_{j≠y} max(0, d_j),  d_j = z_j − z_y
    Gradient:  1. max(0, t) has slope 1 for t > 0 and 0 for t < 0.
               2. ∂d_j/∂z_j = 1 and ∂d_j/∂z_y = −1, so by the chain rule a rival in the lead adds +1 to its own
                  entry and −1 to the entry of the true class:
                  ∂L/∂z_j = 1[d_j ≥ 0] (j ≠ y),   ∂L/∂z_y = −Σ_{j≠y} 1[d_j ≥ 0].
    Kink:      a tie (d_j = 0) counts as a violation. All scores tie at W = 0, so training leaves W = 0, which is a
               global minimiser of L.
    Hessian:   zero away from the kinks; taken as zero on them.
    Reference: Rosenblatt, Psychological Review 65 (1958); the multiclass form of Crammer & Singer, JMLR 3 (2003).
    """

    name = "perceptron"

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_hinge_rows, scores, target, 0.0)

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_count_rows, scores, target, 0.0, torch.Tensor.ge_)

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        return torch.zeros_like(score_gradient[:, 0])


class HingeLoss(_MarginLoss):
    """Multiclass hinge loss in the form of Weston and Watkins: every rival must be beaten by the margin Δ.

    Value:     L = Σ_{j≠y} max(0, d_j + Δ),  d_j = z_j − z_y
    Gradient:  1. max(0, t) has slope 1 for t > 0 and 0 for t < 0.
               2. ∂d_j/∂z_j = 1 and ∂d_j/∂z_y = −1, so each rival inside the margin adds +1 to its own entry and −1
                  to the entry of the true class:
                  ∂L/∂z_j = 1[d_j + Δ > 0] (j ≠ y),   ∂L/∂z_y = −Σ_{j≠y} 1[d_j + Δ > 0].
    Kink:      d_j + Δ = 0 adds nothing.
    Hessian:   zero away from the kinks; taken as zero on them.
    Relation:  k × `torch.nn.MultiMarginLoss(p=1, margin=Δ)`, which divides by the number of classes.
    Reference: Weston & Watkins, ESANN 1999.

    Args:
        margin: Δ > 0. The other arguments are those of `Loss`.
    """

    name = "hinge"
    also_called = ("svm", "multi_margin", "weston_watkins", "max_margin", "linear_svm")

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_hinge_rows, scores, target, self.margin)

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_count_rows, scores, target, self.margin, torch.Tensor.gt_)

    def curvature(self, num_classes: int) -> float:
        # k rivals, each with its corner rounded over [−Δ, Δ], which has curvature 1/(2Δ).
        return num_classes / (2 * self.margin)

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        # q_j = g_j for the rivals, and g_y = −Σ q_j.
        return -self.margin * score_gradient.gather(1, target.unsqueeze(1)).squeeze(1)

    def project_rivals(self, rivals: Tensor) -> Tensor:
        return rivals.clamp_(0, 1)


class CrammerSingerLoss(_MarginLoss):
    """Multiclass hinge loss in the form of Crammer and Singer: only the worst rival counts.

    Value:     L = max_{j≠y} max(0, d_j + Δ),  d_j = z_j − z_y
    Gradient:  1. A maximum has the gradient of the entry that attains it; let r be the worst rival, the j ≠ y with
                  the largest d_j.
               2. As for one rival of the hinge loss: if d_r + Δ > 0, ∂L/∂z_r = 1 and ∂L/∂z_y = −1; all else is 0.
    Kink:      the lowest index among tied rivals; d_r + Δ = 0 adds nothing.
    Hessian:   zero away from the kinks; taken as zero on them.
    Reference: Crammer & Singer, JMLR 2 (2001).

    Args:
        margin: Δ > 0. The other arguments are those of `Loss`.
    """

    name = "crammer_singer"
    also_called = ("crammer-singer", "multiclass_svm")

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_worst_violation_rows, scores, target, self.margin)

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_worst_rival_rows, scores, target, self.margin)

    def curvature(self, num_classes: int) -> float:
        # One rival: ‖e_r − e_y‖² = 2 times the curvature 1/(2Δ) of the rounded corner.
        return 1 / self.margin

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        return -self.margin * score_gradient.gather(1, target.unsqueeze(1)).squeeze(1)

    def project_rivals(self, rivals: Tensor) -> Tensor:
        # Where Σ max(0, q) > 1: subtract the t with Σ max(0, q − t) = 1. That sum is convex and falls with t, so
        # Newton's method from a t that is too small, the largest entry minus 1, only ever goes up, and ends after at
        # most k steps, when no more entries become 0 (Michelot, J. Optim. Theory Appl. 50, 1986).
        level = rivals.amax(1, keepdim=True).sub_(1).clamp_(min=0)
        count = torch.zeros_like(level)
        while True:
            excess = torch.sub(rivals, level).clamp_(min=0)
            total = excess.sum(1, keepdim=True)
            now = excess.sign_().sum(1, keepdim=True)
            if torch.equal(now, count):
                return rivals.sub_(level).clamp_(min=0)
            count = now
            level.add_(total.sub_(1).div_(count.clamp(min=1)).clamp_(min=0))


class SquaredHingeLoss(_MarginLoss):
    """Squared hinge loss: the violations of the margin, squared, over all rivals.

    Value:     L = Σ_{j≠y} max(0, d_j + Δ)²,  d_j = z_j − z_y
    Gradient:  1. max(0, t)² has derivative 2 max(0, t), also at t = 0: the square removes the kink.
               2. ∂d_j/∂z_j = 1 and ∂d_j/∂z_y = −1:
                  ∂L/∂z_j = 2 max(0, d_j + Δ) (j ≠ y),   ∂L/∂z_y = −Σ_{j≠y} 2 max(0, d_j + Δ).
    Hessian:   (Hv)_j = 2·1[d_j + Δ > 0] (v_j − v_y),  (Hv)_y = −Σ_{j≠y} (Hv)_j; its norm is at most 2k.
    Relation:  k × `torch.nn.MultiMarginLoss(p=2, margin=Δ)`, which divides by the number of classes.
    Reference: Weston & Watkins, ESANN 1999, with the L2-SVM loss of Chang & Lin, JMLR 9 (2008).

    Args:
        margin: Δ > 0. The other arguments are those of `Loss`.
    """

    name = "squared_hinge"
    also_called = ("l2svm", "l2_svm", "squared_svm", "hinge2")

    def smoothness(self, num_classes: int) -> float:
        return 2.0 * num_classes

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_squared_hinge_rows, scores, target, self.margin)

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_double_violation_rows, scores, target, self.margin)

    def hessian_product(self, scores: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        own = target.unsqueeze(1)
        active = _leads(scores, own).add_(self.margin) > 0
        # Column y of the product is 0 so far. Out of place, so that a batch of vectors (vmap) stays a batch.
        product = torch.where(active, 2 * (vector - vector.gather(1, own)), 0)
        return product.scatter(1, own, -product.sum(1, keepdim=True))

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        own = target.unsqueeze(1)
        rivals = score_gradient.scatter(1, own, 0)
        return self.margin * rivals.sum(1) - rivals.square().sum(1) / 4


class SoftmaxLoss(Loss):
    """Softmax loss (cross-entropy): the negative log-probability of the true class.

    Value:     p = softmax(z), p_j = e^{z_j} / Σ_l e^{z_l};  L = −log p_y = log Σ_l e^{z_l} − z_y
    Gradient:  1. ∂/∂z_j log Σ_l e^{z_l} = e^{z_j} / Σ_l e^{z_l} = p_j.
               2. ∂z_y/∂z_j = 1[j = y].
               3. So ∂L/∂z_j = p_j for j ≠ y and p_y − 1 for the true class: the probabilities with one subtracted
                  at y, the textbook's "P adjusted".
    Soft:      with target weights q_j ≥ 0 in place of the one-hot row, L = Σ_j q_j (−log p_j) and
               ∂L/∂z = (Σ_j q_j) p − q. Label smoothing ε and class probabilities are both of this form.
    Hessian:   Hv = (Σ_j q_j) (p∘v − p ⟨p, v⟩); its norm is at most ½ for Σ q = 1.
    Relation:  `torch.nn.CrossEntropyLoss`, options included.
    Reference: Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.4.

    Args:
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε) one-hot + ε/k, weighted as torch weights it.
            The other arguments are those of `Loss`.

    The target may also be class probabilities: floating point, of the shape of the scores; `reduction="mean"` then
    divides by the number of samples, as in torch.
    """

    name = "softmax"
    also_called = ("cross_entropy", "crossentropy", "ce", "nll", "multinomial", "categorical_crossentropy", "log_loss")

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate: bool = True,
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction, validate=validate)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is between 0 and 1, got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)

    def smoothness(self, num_classes: int) -> float:
        return 0.5

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return blocked(_cross_entropy_rows if target.dim() == 1 else _soft_cross_entropy_rows, scores, target)

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 2:
            return torch.softmax(scores, 1).mul_(target.sum(1, keepdim=True)).sub_(target)
        adjusted = torch.softmax(scores, 1)
        return adjusted.scatter_add_(1, target.unsqueeze(1), adjusted.new_full((len(target), 1), -1.0))

    def value_and_gradient(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if target.dim() == 2:
            return super().value_and_gradient(scores, target)
        if scores.is_contiguous():
            log_p, own = torch.log_softmax(scores, 1), target.unsqueeze(1)
            value = -log_p.gather(1, own).squeeze(1)
            return value, log_p.exp_().scatter_add_(1, own, log_p.new_full(own.shape, -1.0))
        # Class after class, as full-batch solvers hold them: sums over classes then add whole rows of samples.
        own, shifted = target.unsqueeze(0), scores.T - scores.amax(1)
        of_target = shifted.gather(0, own).squeeze(0)
        p = shifted.exp_()
        total = p.sum(0)
        p.div_(total).scatter_add_(0, own, p.new_full((1, len(target)), -1.0))
        return total.log_().sub_(of_target), p.T

    def hessian_product(self, scores: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        p = torch.softmax(scores, 1)
        product = p * (vector - (p * vector).sum(1, keepdim=True))
        return product if target.dim() == 1 else product * target.sum(1, keepdim=True)

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        # L = s·log Σ e^z − ⟨q, z⟩ with s = Σ q, so g + q = s·p and −L*(g) = s·entropy(p).
        if target.dim() == 2:
            total = target.sum(1, keepdim=True)
            p = (score_gradient + target) / total
            return -(total * torch.xlogy(p, p)).sum(1)
        ones = score_gradient.new_ones((len(target), 1))
        p = score_gradient.scatter_add(1, target.unsqueeze(1), ones)
        return -torch.xlogy(p, p).sum(1)

    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, min(1, scores.dim() - 1))

    def encode(self, scores: Tensor, target: Tensor, *, all_count: bool = False) -> Encoded:
        if target.dim() == 2:
            if self.weight is not None and self.weight.shape[0] != target.shape[1]:
                raise ValueError(f"weight has {self.weight.shape[0]} entries for {target.shape[1]} classes")
            return Encoded(self._smoothed(target.to(scores.dtype)), None, None)
        if self.label_smoothing == 0:
            return super().encode(scores, target, all_count=all_count)
        # Smoothing spreads the class weights too (torch's rule), so they go into the target row, not in front of it.
        normaliser = super().encode(scores, target, all_count=all_count).normaliser
        target, counts = self._class_indices(scores, target, all_count)
        one_hot = torch.zeros_like(scores).scatter(1, target.unsqueeze(1), 1)
        return Encoded(self._smoothed(one_hot), None if counts is None else counts.to(scores.dtype), normaliser)

    def _smoothed(self, rows: Tensor) -> Tensor:
        rows = rows * (1 - self.label_smoothing) + self.label_smoothing / rows.shape[1]
        return rows if self.weight is None else rows * self.weight.to(rows)

    def _check_dtypes(self, scores: Tensor, target: Tensor) -> None:
        if target.is_floating_point() and target.shape == scores.shape:
            if target.requires_grad:
                raise ValueError("target requires grad, but only the scores get a gradient: use target.detach()")
            return super()._check_dtypes(scores, target.long())
        if target.is_floating_point():
            raise TypeError(
                f"the softmax loss takes class indices (an integer dtype) or class probabilities of the shape of the "
                f"scores {tuple(scores.shape)}, got {target.dtype} of shape {tuple(target.shape)}"
            )
        return super()._check_dtypes(scores, target)

    def _rows(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if not (target.is_floating_point() and target.shape == scores.shape):
            return super()._rows(scores, target)
        self._check_dtypes(scores, target)
        if scores.dim() > 2:
            scores, target = (t.movedim(1, -1).flatten(0, -2) for t in (scores, target))
        elif scores.dim() == 1:
            scores, target = scores.unsqueeze(0), target.unsqueeze(0)
        return full_precision(scores), target


class LogisticLoss(Loss):
    """Binary logistic loss on one score: the negative log-likelihood of y in {0, 1} under P(y = 1) = σ(z).

    Value:     L = −y log σ(z) − (1 − y) log(1 − σ(z)),  σ(z) = 1 / (1 + e^{−z})
    Gradient:  1. σ'(z) = σ(z) (1 − σ(z)).
               2. ∂/∂z (−log σ) = −(1 − σ) and ∂/∂z (−log(1 − σ)) = σ.
               3. So ∂L/∂z = −y (1 − σ) + (1 − y) σ = σ(z) − y.
    Hessian:   σ(z) (1 − σ(z)), at most ¼.
    Relation:  `torch.nn.BCEWithLogitsLoss`; its `pos_weight=c` is weight=(1, c).
    Reference: Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.2.

    Args:
        weight: (2,) = (w_0, w_1). The other arguments are those of `Loss`.

    Shapes: scores (n,) or (n, 1) (or (n, 1, d1, …)) with target (n,) of {0, 1}.
    """

    name = "logistic"
    also_called = ("bce", "binary_cross_entropy", "bcewithlogits", "logit", "sigmoid", "logistic_regression")

    def smoothness(self, num_classes: int) -> float:
        return 0.25

    @classmethod
    def outputs(cls, num_classes: int) -> int:
        if num_classes != 2:
            raise ValueError(
                f"the logistic loss separates 2 classes, but there are num_classes={num_classes}: use softmax or hinge"
            )
        return 1

    @classmethod
    def classes(cls, outputs: int) -> int:
        if outputs != 1:
            raise ValueError(
                f"the logistic loss takes one score per sample, (n,) or (n, 1), got {outputs}: use softmax"
            )
        return 2

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return -F.logsigmoid(torch.where(target == 1, scores[:, 0], -scores[:, 0]))

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        # For y = 1 written as −σ(−z): σ(z) − 1 would lose every digit for large z.
        z = scores[:, 0]
        return torch.where(target == 1, -torch.sigmoid(-z), torch.sigmoid(z)).unsqueeze(1)

    def hessian_product(self, scores: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        return torch.sigmoid(scores) * torch.sigmoid(-scores) * vector

    def dual(self, score_gradient: Tensor, target: Tensor) -> Tensor:
        p = score_gradient[:, 0].abs()
        return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)

    def predict(self, scores: Tensor) -> Tensor:
        return (scores.squeeze(-1) > 0).long()

    def probabilities(self, scores: Tensor) -> Tensor:
        z = scores.squeeze(-1) if scores.dim() > 1 and scores.shape[-1] == 1 else scores
        return torch.stack((torch.sigmoid(-z), torch.sigmoid(z)), -1)

    def _rows(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if scores.shape == target.shape:
            scores = scores.unsqueeze(min(1, scores.dim()))
        return super()._rows(scores, target)


LOSSES: tuple[type[Loss], ...] = (
    PerceptronLoss,
    HingeLoss,
    CrammerSingerLoss,
    SquaredHingeLoss,
    SoftmaxLoss,
    LogisticLoss,
)
LOSS_REGISTRY: Registry[Loss] = Registry("loss", Loss, LOSSES)


def trained_spec(loss: Loss) -> dict[str, Any]:
    """What a head remembers of the loss it was trained with: how the labels were checked is not part of it."""
    spec = LOSS_REGISTRY.spec(loss)
    spec.pop("validate", None)
    return spec


def balanced_weight(counts: Tensor) -> Tensor:
    """N / (num_classes · count) for each class, 0 for one that does not occur; float64 (num_classes,)."""
    weight = counts.sum() / (len(counts) * counts.clamp(min=1).double())
    return torch.where(counts > 0, weight, 0)


def _leads(scores: Tensor, own: Tensor) -> Tensor:
    """d_j = z_j − z_y, (n, k), a new tensor. `own` (n, 1) holds y."""
    return scores - scores.gather(1, own)


def _close_rows(rivals: Tensor, own: Tensor) -> Tensor:
    """Set column y to minus the sum of the others, in place."""
    rivals.scatter_(1, own, 0)
    return rivals.scatter_(1, own, -rivals.sum(1, keepdim=True))


def _hinge_rows(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    own = target.unsqueeze(1)
    return _leads(scores, own).add_(margin).relu_().scatter_(1, own, 0).sum(1)


def _squared_hinge_rows(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    own = target.unsqueeze(1)
    return _leads(scores, own).add_(margin).relu_().scatter_(1, own, 0).square().sum(1)


def _count_rows(scores: Tensor, target: Tensor, margin: float, violates: Callable[[Tensor, float], Tensor]) -> Tensor:
    own = target.unsqueeze(1)
    return _close_rows(violates(_leads(scores, own).add_(margin), 0), own)


def _double_violation_rows(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    own = target.unsqueeze(1)
    return _close_rows(_leads(scores, own).add_(margin).relu_().mul_(2), own)


def _worst(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The lead d_r of the worst rival and r, both (n, 1). A lone class has no rival: −inf, and index 0."""
    rivals = scores.scatter(1, own, -math.inf)
    # argmax returns the first of equal entries; if all rivals are masked (−inf) any index will do.
    rival = rivals.argmax(1, keepdim=True)
    return rivals.gather(1, rival) - scores.gather(1, own), rival


def _worst_violation_rows(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    lead, _ = _worst(scores, target.unsqueeze(1))
    return lead.add_(margin).relu_().squeeze(1)


def _worst_rival_rows(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    own = target.unsqueeze(1)
    lead, rival = _worst(scores, own)
    active = lead.add_(margin).gt_(0)
    return torch.zeros_like(scores).scatter_(1, rival, active).scatter_add_(1, own, -active)


def _cross_entropy_rows(scores: Tensor, target: Tensor) -> Tensor:
    # log_softmax subtracts the maximum first, so the value is finite and exact for any finite scores.
    return -torch.log_softmax(scores, 1).gather(1, target.unsqueeze(1)).squeeze(1)


def _soft_cross_entropy_rows(scores: Tensor, target: Tensor) -> Tensor:
    # A masked class (−inf) with target weight 0 adds nothing.
    return -torch.where(target == 0, 0, target * torch.log_softmax(scores, 1)).sum(1)
