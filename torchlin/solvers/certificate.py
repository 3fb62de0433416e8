"""How far from the optimum: a dual value that no W and b can go below."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlin.penalties import Penalty
from torchlin.solvers.problem import DataTerm, Evaluated


@dataclass(frozen=True)
class Certificate:
    """F at a point (`primal`), a lower bound of F everywhere with |b_j| ≤ `bias_bound` (`dual`), and their distance.

    Attributes:
        gap: (primal − dual) / max(primal, 10⁻³ F(0)), or, where `measure` is "gradient", what `reason` says.
        measure: "gap", or "gradient" where no finite gap exists.
        reason: why there is no gap; empty where there is one.
    """

    primal: float
    dual: float
    gap: float
    bias_bound: float
    measure: str = "gap"
    reason: str = ""


def bias_bound(bias: Tensor) -> float:
    """B: far more than any |b_j| near the optimum. What is left of Σ s_i g_i/N is charged to D with this factor."""
    return 10 * (1 + float(bias.abs().max()))


def conjugate_penalty(penalty: Penalty | None, v: Tensor) -> float:
    """λR* at V: sup_W −⟨W, V⟩ − λR(W).

    L2 and elastic net: Σ (|V| − λα)₊² / (4λ(1 − α)). L1 (and no penalty): 0 where |V| ≤ λ everywhere, else infinite.
    """
    l1, l2 = (0.0, 0.0) if penalty is None else (penalty.l1, penalty.l2)
    excess = (v.abs() - l1).clamp_(min=0)
    if l2 > 0:
        return float(excess.square_().sum()) / (4 * l2)
    return 0.0 if float(excess.max()) <= 1e-13 * max(l1, 1e-300) else float("inf")


def certificate(
    data: DataTerm, penalty: Penalty | None, at: Evaluated, v: Tensor, primal: float, at_zero: float, bias: Tensor,
    value: float, exact: bool = True,
) -> Certificate:  # fmt: skip
    """The certificate that the score gradients at some scores give.

        D = (1/N) Σ −s_i L*(t g_i) − λR*(t V) − B ‖t Σ s_i g_i/N‖₁,   V = Gᵀ X̃ / N

    t = 1, but for L1 the largest t ≤ 1 with t|V| ≤ λ. The last term charges what rounding leaves of Σ g = 0.

    Args:
        at: scores, which include the bias, and the gradients there.
        v: V, (k, p).
        value: the data term at the scores; primal: that and the penalty; at_zero: F(0).
        exact: the gradient is the loss's own at the scores; if not (a smoothed loss's), the loss declares its dual.
    """
    bound = bias_bound(bias)
    scores, _, gradient, charged = at
    residual = float(charged.abs().sum())
    l1, l2 = (0.0, 0.0) if penalty is None else (penalty.l1, penalty.l2)
    if l1 == 0 and l2 == 0:
        size = float(v.norm()) + residual
        return Certificate(
            primal, -float("inf"), size, bound, "gradient", "λ = 0: gap is the norm of the gradient of F"
        )
    if l2 > 0:
        dual = data.conjugate(scores, gradient, value) if exact else data.dual(gradient)
        dual -= conjugate_penalty(penalty, v)
    else:
        scale = min(1.0, l1 / max(float(v.abs().max()), 1e-300))
        dual = data.conjugate(scores, gradient, value) if scale == 1 else data.dual(gradient * scale)
    dual = dual - bound * residual
    return Certificate(primal, dual, (primal - dual) / max(primal, 1e-3 * at_zero), bound)
