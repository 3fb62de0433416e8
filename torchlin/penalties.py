"""Penalties λ R(W) on the weights: one family, R = α Σ|w| + (1 − α) Σ w²."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from torchlin.registry import Registry, options_of


class Penalty:
    """λ R(w) with R = α Σ|w| + (1 − α) Σ w², the textbook's elastic net: no ½, and no division by n.

    L2 is α = 0 and L1 is α = 1; this class holds the mathematics of all three.

    Args:
        strength: λ ≥ 0.
        alpha: α in [0, 1], the share of the L1 part. This is not scikit-learn's `l1_ratio` ρ, whose L2 part carries a
            factor ½: α = 2ρ/(1 + ρ).

    Raises:
        ValueError: λ negative or not finite, α outside [0, 1].
    """

    name: ClassVar[str]
    also_called: ClassVar[tuple[str, ...]] = ()

    def __init__(self, strength: float, alpha: float) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"the strength λ of a penalty is a number ≥ 0, got {strength}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the share of the L1 part, between 0 and 1, got {alpha}")
        self.strength = float(strength)
        self.alpha = float(alpha)

    @property
    def l1(self) -> float:
        """λα, the factor of Σ|w|."""
        return self.strength * self.alpha

    @property
    def l2(self) -> float:
        """λ(1 − α), the factor of Σ w²."""
        return self.strength * (1 - self.alpha)

    def value(self, w: Tensor) -> Tensor:
        """λα Σ|w| + λ(1 − α) Σ w², a scalar, differentiable: `loss(z, y) + penalty.value(head.weight)`."""
        return self.l1 * w.abs().sum() + self.l2 * w.square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        """λα sign(w) + 2λ(1 − α) w, the shape of w; at w = 0 the subgradient 0 of |w| is taken."""
        return self.l1 * w.sign() + 2 * self.l2 * w

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_v ½(v − w)²/step + λ R(v), elementwise.

        Soft thresholding at step·λα gives exact zeros; division by 1 + 2·step·λ(1 − α) shrinks the rest.

        Args:
            step: the step length η ≥ 0, a number or a tensor that broadcasts against w (one step per weight).
        """
        return shrink(soft_threshold(w, step * self.l1), step * self.l2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in options_of(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.strength, self.alpha))


def soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(w) max(|w| − threshold, 0): the proximal map of threshold·|w|."""
    return w.sign() * (w.abs() - threshold).clamp_(min=0)


def shrink(w: Tensor, amount: float | Tensor) -> Tensor:
    """w / (1 + 2·amount): the proximal map of amount·w²."""
    return w / (1 + 2 * amount)


class L2(Penalty):
    """Ridge: λ Σ w², with gradient 2λw. In torch's words, `weight_decay` = 2λ under plain SGD.

    Args:
        strength: λ ≥ 0.

    Reference: Hoerl & Kennard, Technometrics 12 (1970).
    """

    name = "l2"
    also_called = ("ridge", "weight_decay", "tikhonov")

    def __init__(self, strength: float) -> None:
        super().__init__(strength, alpha=0.0)


class L1(Penalty):
    """Lasso: λ Σ|w|, which sets weights to exactly zero.

    Args:
        strength: λ ≥ 0.

    Reference: Tibshirani, J. R. Statist. Soc. B 58 (1996).
    """

    name = "l1"
    also_called = ("lasso", "sparse")

    def __init__(self, strength: float) -> None:
        super().__init__(strength, alpha=1.0)


class ElasticNet(Penalty):
    """λ (α Σ|w| + (1 − α) Σ w²): sparse like L1, and stable under correlated features like L2.

    Args:
        strength: λ ≥ 0.
        alpha: α in [0, 1], the share of the L1 part; scikit-learn's `l1_ratio` ρ is α/(2 − α).

    Reference: Zou & Hastie, J. R. Statist. Soc. B 67 (2005).
    """

    name = "elastic_net"
    also_called = ("elasticnet", "elastic-net", "enet", "l1_l2")

    def __init__(self, strength: float, alpha: float = 0.5) -> None:
        super().__init__(strength, alpha)


PENALTIES: tuple[type[Penalty], ...] = (L2, L1, ElasticNet)
PENALTY_REGISTRY: Registry[Penalty] = Registry("penalty", Penalty, PENALTIES)
