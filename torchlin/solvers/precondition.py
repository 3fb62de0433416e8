"""Approximate inverse Hessians from the Gram matrix, shared by all classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlin.solvers.state import Point, Run

Preconditioner = Callable[[Tensor], Tensor]

# The exact Hessian is formed for this many unknowns and multiplications at most.
_UNKNOWNS, _WORK = 2500, 2e10
# The largest trace over ridge of a matrix that is factored in float32.
_FLOAT32 = 1e6


class Preconditioners:
    """The preconditioner that fits a problem's size, for any point of it: exact Newton, Gram, or a multiple of I."""

    def __init__(self, run: Run, gram: Tensor | None) -> None:
        self.run, self.gram = run, gram
        self.ridge = 0.0 if run.penalty is None else 2 * run.penalty.l2
        self._built: tuple[float, Preconditioner] | None = None
        self._x = bias_appended(run) if is_small(run) else None

    @property
    def exact(self) -> bool:
        return self._x is not None

    def __call__(self, point: Point) -> Preconditioner:
        term = self.run.term
        if self._x is not None:
            return newton_inverse(self._x, term.hessians(point.scores, point.gradient), self.ridge)
        curvature = max(term.mean_curvature(point.scores, point.gradient), self.run.least_curvature)
        if self._built is not None and 0.6 < curvature / self._built[0] < 1.7:
            return self._built[1]
        inverse = (
            scaled_identity(curvature, self.ridge)
            if self.gram is None
            else gram_inverse(self.gram, curvature, self.ridge)
        )
        self._built = curvature, inverse
        return inverse


def is_small(run: Run) -> bool:
    """Whether the Hessian of all weights is formed and factored in the time of a few passes."""
    (n, p), k = run.features.shape, run.data.outputs
    return k * (p + 1) <= _UNKNOWNS and n * (k * (p + 1)) ** 2 <= _WORK


def bias_appended(run: Run) -> Tensor:
    """[X̃ 1] in float64, (n, p + 1); without a bias [X̃ 0]."""
    rows = run.features.rows(slice(0, run.features.shape[0])).double()
    return torch.cat((rows, rows.new_full((len(rows), 1), run.bias.column)), 1)


def gram_inverse(gram: Tensor, curvature: float, ridge: float) -> Preconditioner:
    """V ↦ V (c·Gram + r·I)⁻¹ on rows (k, p).

    The Hessian of the data term is (1/N) Σ H_i ⊗ x̃x̃ᵀ with small class matrices H_i; it is replaced by their average
    eigenvalue c times X̃ᵀX̃/N, so that one Cholesky factor serves all classes.

    Args:
        gram: X̃ᵀX̃/N, (p, p); changed in no bit.
        curvature: c.
        ridge: r = 2λ(1 − α), the curvature of the penalty.
    """
    # A preconditioner need not be exact: float32 serves, in half the time, unless rounding would reach its smallest
    # eigenvalue, which is at least r.
    small = curvature * float(gram.diagonal().sum()) < _FLOAT32 * ridge
    hessian = gram.to(torch.float32 if small else torch.float64, copy=True).mul_(curvature)
    diagonal = hessian.diagonal()
    # Duplicated or constant features leave the Gram singular; where λ = 0 something must hold them.
    jitter = max(ridge, 1e-9 * float(diagonal.mean()), 1e-300)
    diagonal += jitter
    while True:
        factor, info = torch.linalg.cholesky_ex(hessian)
        if int(info) == 0:
            break
        diagonal += 9 * jitter
        jitter *= 10
    return lambda v: torch.cholesky_solve(v.T.to(factor), factor).T.double()


def scaled_identity(curvature: float, ridge: float) -> Preconditioner:
    """V ↦ V / (c + r): what is left where no factorisation fits in memory. Standardised features have mean square 1."""
    return lambda v: v / (curvature + ridge)


def newton_inverse(x: Tensor, blocks: Tensor, ridge: float) -> Preconditioner:
    """V ↦ the W part of H⁻¹ (V, 0) with the exact Hessian of a small problem, the bias among its unknowns.

    Args:
        x: [X̃ 1], (n, p + 1).
        blocks: s_i ∂²L_i/∂z_i² / N, (n, k, k).
        ridge: 2λ(1 − α), on the weights only.
    """
    k, width = blocks.shape[1], x.shape[1]
    hessian = hessian_matrix(x, blocks)
    diagonal = hessian.diagonal().view(k, width)
    jitter = 1e-10 * float(diagonal.mean()) + 1e-300
    diagonal[:, :-1] += ridge
    diagonal += jitter
    factor, info = torch.linalg.cholesky_ex(hessian)
    while int(info):
        jitter *= 10
        diagonal += jitter
        factor, info = torch.linalg.cholesky_ex(hessian)

    def inverse(v: Tensor) -> Tensor:
        right = torch.cat((v, v.new_zeros(k, 1)), 1).view(-1, 1)
        return torch.cholesky_solve(right, factor).view(k, width)[:, :-1]

    return inverse


def hessian_matrix(x: Tensor, blocks: Tensor) -> Tensor:
    """Σ_i B_i ⊗ x_i x_iᵀ, (kq, kq), from x (n, q) and B (n, k, k)."""
    k, width = blocks.shape[1], x.shape[1]
    hessian = x.new_empty(k, width, k, width)
    for a in range(k):
        for b in range(a + 1):
            block = x.T @ (x * blocks[:, a, b].unsqueeze(1))
            hessian[a, :, b], hessian[b, :, a] = block, block.T
    return hessian.view(k * width, k * width)
