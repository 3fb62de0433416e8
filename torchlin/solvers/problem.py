"""The data term (1/N) Σ s_i L_i on scores, in float64, with the unpenalised bias solved exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchlin.losses import Loss

# Sums over samples are formed in fixed blocks, so that the number of threads does not change a bit of them.
_BLOCK = 4096
# torch works on fewer numbers than 2¹⁵ with one thread; on more it wakes the others, which costs as much as the work.
_SERIAL = (1 << 15) - 1


def fixed_sum(values: Tensor) -> float:
    """Σ values, in an order that does not depend on the number of threads."""
    flat = values.reshape(-1)
    whole = len(flat) // _BLOCK * _BLOCK
    parts = flat[:whole].view(-1, _BLOCK).sum(1).tolist() if whole else []
    return sum(parts, float(flat[whole:].sum()))


class Evaluated(NamedTuple):
    """The data term at scores (n, k): value, unweighted gradients ∂L_i/∂z_i (n, k), and (1/N) Σ s_i g_i (k,)."""

    scores: Tensor
    value: float
    gradient: Tensor
    residual: Tensor


class DataTerm:
    """(1/N) Σ s_i L_i as a function of scores (n, k); s_i are the class weights times the sample weights.

    Scores and gradients lie in memory class after class, and everything is computed in fixed blocks of samples, which
    stay in the cache from one operation to the next and make the sums independent of the number of threads.

    Args:
        loss: its `reduction` does not matter.
        target: (n,), checked by the loss.
        outputs: k.
        sample_weight: (n,) ≥ 0, or None for 1 each.
    """

    def __init__(self, loss: Loss, target: Tensor, outputs: int, sample_weight: Tensor | None = None) -> None:
        shape = torch.zeros(1, 1, dtype=torch.float64, device=target.device).expand(len(target), outputs)
        self.target, coefficient, normaliser = loss.encode(shape, target)
        self.loss, self.outputs, self.size = loss, outputs, len(target)
        if sample_weight is not None:
            sample_weight = sample_weight.to(shape)
            coefficient = sample_weight if coefficient is None else coefficient * sample_weight
            normaliser = sample_weight if normaliser is None else normaliser * sample_weight
        self.total = float(self.size) if normaliser is None else fixed_sum(normaliser)
        if not self.total > 0:
            raise ValueError("no sample counts: all are ignored or have weight 0")
        self.coefficient = coefficient

    def blocks(self) -> Iterator[slice]:
        step = max(64, min(_BLOCK, _SERIAL // self.outputs))
        for start in range(0, self.size, step):
            yield slice(start, min(self.size, start + step))

    def rows(self, scores: Tensor, block: slice | Tensor) -> tuple[Tensor, Tensor]:
        """L_i (m,) and ∂L_i/∂z_i (m, k) at the scores (m, k) of a block of samples."""
        return self.loss.value_and_gradient(scores, self.target[block])

    def evaluate(self, scores: Tensor, bias: Tensor | None = None) -> Evaluated:
        """Value, gradient and its sum at scores + bias, in one sweep."""
        at = scores if bias is None else torch.empty_like(scores)
        gradient = torch.empty(self.outputs, self.size, dtype=torch.float64, device=scores.device).T
        value, residual = torch.zeros((), dtype=torch.float64, device=scores.device), gradient.new_zeros(self.outputs)
        for block in self.blocks():
            z = scores[block]
            if bias is not None:
                z = torch.add(z, bias, out=at[block])
            values, rows = self.rows(z, block)
            gradient[block] = rows
            if self.coefficient is not None:
                values = values * self.coefficient[block]
                rows = rows * self.coefficient[block].unsqueeze(1)
            value += values.sum()
            residual += rows.sum(0)
        return Evaluated(at, float(value) / self.total, gradient, residual / self.total)

    def residual(self, scores: Tensor, some: slice | Tensor) -> Tensor:
        """(1/N) Σ s_i g_i over some samples, (k,), from their scores (m, k)."""
        _, rows = self.rows(scores, some)
        if self.coefficient is not None:
            rows = rows * self.coefficient[some].unsqueeze(1)
        return rows.sum(0) / self.total

    def value(self, scores: Tensor) -> float:
        values = torch.cat([self.loss.value(scores[block], self.target[block]) for block in self.blocks()])
        return self.mean(values)

    def mean(self, values: Tensor) -> float:
        """(1/N) Σ s_i values_i, (n,)."""
        return fixed_sum(values if self.coefficient is None else values * self.coefficient) / self.total

    def gradient(self, scores: Tensor) -> Tensor:
        """∂L_i/∂z_i, (n, k), unweighted: the form in which it is dual-feasible."""
        return self.evaluate(scores).gradient

    def weighted(self, gradient: Tensor) -> Tensor:
        """s_i g_i / N, whose product with X̃ is the gradient of the data term."""
        if self.coefficient is None:
            return gradient / self.total
        return gradient * (self.coefficient / self.total).unsqueeze(1)

    def conjugate(self, scores: Tensor, gradient: Tensor, value: float) -> float:
        """(1/N) Σ −s_i L*(g_i) where g is the gradient at the scores and `value` the data term there.

        There Fenchel and Young's inequality is an equality, −L*(g) = L(z) − ⟨z, g⟩, for every convex loss.
        """
        return value - self.slope(scores, gradient)

    def dual(self, gradient: Tensor) -> float:
        """(1/N) Σ −s_i L*(g_i) for any g of dual-feasible form."""
        return self.mean(torch.cat([self.loss.dual(gradient[b], self.target[b]) for b in self.blocks()]))

    def slope(self, gradient: Tensor, direction: Tensor) -> float:
        """(1/N) Σ s_i ⟨g_i, d_i⟩: the derivative of the data term when the scores move by d, (n, k)."""
        products = torch.cat([(gradient[block] * direction[block]).sum(1) for block in self.blocks()])
        return self.mean(products)

    def along(self, scores: Tensor, direction: Tensor, step: float) -> tuple[float, float]:
        """The data term at scores + step·direction, and its derivative with respect to the step."""
        totals = torch.zeros(2, dtype=torch.float64, device=scores.device)
        for block in self.blocks():
            d = direction[block]
            values, rows = self.rows(torch.add(scores[block], d, alpha=step), block)
            slopes = (rows * d).sum(1)
            if self.coefficient is not None:
                values, slopes = values * self.coefficient[block], slopes * self.coefficient[block]
            totals[0] += values.sum()
            totals[1] += slopes.sum()
        value, slope = (totals / self.total).tolist()
        return value, slope

    def mean_curvature(self, scores: Tensor, gradient: Tensor) -> float:
        """The average eigenvalue of the Hessians ∂²L_i/∂z_i² over the directions in which they are not zero.

        By differences of the gradient along random signs, so it also serves losses without a Hessian.
        """
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, scores.T.shape, generator=generator, dtype=torch.int8).to(scores).T * 2 - 1
        step = 1e-3
        change = (self.gradient(scores + step * signs) - gradient) / step
        return self.slope(change, signs) / max(1, self.outputs - 1)

    def hessians(self, scores: Tensor, gradient: Tensor) -> Tensor:
        """s_i ∂²L_i/∂z_i² / N, (n, k, k): one product for each class, or one gradient where the loss has no Hessian."""
        step = 1e-6
        declared = type(self.loss).hessian_product is not Loss.hessian_product
        columns = []
        for unit in torch.eye(self.outputs, dtype=torch.float64, device=scores.device):
            if declared:
                column = self.loss.hessian_product(scores, self.target, unit.expand_as(scores))
            else:
                column = (self.gradient(scores + step * unit) - gradient) / step
            columns.append(self.weighted(column))
        blocks = torch.stack(columns, 2)
        return (blocks + blocks.mT) / 2


class Bias:
    """The unpenalised bias: b = argmin_b (1/N) Σ s_i L_i(z_i + b), by Newton's method with a Hessian that is kept.

    Between two calls the scores change little, so the (k, k) Hessian of the last call serves again, corrected by what
    each step shows of it (BFGS).
    """

    # What stands beside a sample's features for the bias.
    column = 1.0

    def __init__(self, data: DataTerm, value: Tensor | None = None, tol: float = 1e-11) -> None:
        self.data = data
        self.value = torch.zeros(data.outputs, dtype=torch.float64, device=data.target.device)
        if value is not None:
            self.value += value
        self.tol = tol
        self._hessian: Tensor | None = None

    def of(self, data: DataTerm) -> Bias:
        """The same for another data term, from the present value on."""
        return type(self)(data, self.value, self.tol)

    def start(self, value: Tensor) -> None:
        """Go on from this value, (k,)."""
        self.value = self.value + value

    def solve(self, scores: Tensor) -> Evaluated:
        """The data term with the bias; Σ s_i g_i / N is then at most `tol` in every class."""
        at = self.data.evaluate(scores, self.value)
        damping = 0.0
        for _ in range(200):
            size = float(at.residual.abs().max())
            if size <= self.tol:
                break
            fresh = self._hessian is None
            if self._hessian is None:
                self._hessian = self._differences(at.scores)
            step = self._newton(at.residual, damping)
            value = self.value + step
            trial = self.data.evaluate(scores, value)
            now = float(trial.residual.abs().max())
            # A convex function may well fall while its gradient grows, and near the minimum only the latter can be
            # seen; but far out, where the function is linear, the gradient may be smaller too.
            falls = trial.value < at.value + 1e-4 * float(step @ at.residual)
            if falls or (now < size and trial.value <= at.value + 1e-10 * abs(at.value)):
                s, y = step, trial.residual - at.residual
                self.value, at = value, trial
                damping = 0.0 if now < 0.25 * size else damping / 4
                if now > 0.7 * size and not fresh:
                    self._hessian = None
                elif float(s @ y) > 0 and float(s @ (hs := self._hessian @ s)) > 0:
                    self._hessian = self._hessian + torch.outer(y, y) / (s @ y) - torch.outer(hs, hs) / (s @ hs)
            elif not fresh and damping == 0:
                self._hessian = None
            else:  # where the function is flat, or bends within the step (Levenberg and Marquardt)
                damping = max(8 * damping, 1e-3 * size)
                if damping > 1e6 * size:
                    break  # rounding allows no more
        return at

    def response(self, scores: Tensor, change: Tensor, *, exact: bool) -> Tensor:
        """How the solved bias moves, to first order, when the scores (with bias) move by `change`: (k,).

        Unless it is to be exact, the kept Hessian may be one of other scores.
        """
        step = 1e-4 / max(float(change.abs().max()), 1e-300)
        base = self.data.evaluate(scores).residual
        moved = self.data.evaluate(torch.add(scores, change, alpha=step)).residual
        if self._hessian is None or self.data.outputs <= 3 or exact:
            self._hessian = self._differences(scores)
        return self._newton((moved - base) / step)

    def _newton(self, residual: Tensor, damping: float = 0.0) -> Tensor:
        assert self._hessian is not None
        if damping > 0:
            values, vectors = torch.linalg.eigh(self._hessian)
            step: Tensor = -vectors @ ((vectors.T @ residual) / (values.clamp(min=0) + damping))
        else:
            step = -torch.linalg.pinv(self._hessian, hermitian=True, rtol=1e-10) @ residual
        # Every multiclass loss is free up to one number added to all biases, along which nothing should drift.
        return step - step.mean() if len(step) > 1 else step

    def _differences(self, scores: Tensor) -> Tensor:
        """The Hessian (k, k) by differences; of many classes on some of the samples, as it need not be exact."""
        k, n, step = self.data.outputs, self.data.size, 1e-5
        count = max(-(-16 * n // k), 20 * k)
        some: slice | Tensor = slice(None)
        if count < n:
            some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].sort().values.to(scores.device)
        z = scores[some]
        base = self.data.residual(z, some)
        moves = step * torch.eye(k, dtype=torch.float64, device=scores.device)
        slopes = [(self.data.residual(z + move, some) - base) / step for move in moves]
        hessian = torch.stack(slopes) * max(1.0, n / count)
        return (hessian + hessian.T) / 2


class NoBias(Bias):
    """No bias: it stays 0, and nothing asks for Σ s_i g_i = 0."""

    column = 0.0

    def solve(self, scores: Tensor) -> Evaluated:
        at = self.data.evaluate(scores)
        return at._replace(residual=torch.zeros_like(at.residual))

    def response(self, scores: Tensor, change: Tensor, *, exact: bool) -> Tensor:
        return torch.zeros_like(self.value)

    def start(self, value: Tensor) -> None:
        pass
