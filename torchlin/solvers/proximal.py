"""Proximal Newton steps on the Gram matrix, for penalties with an L1 part: exact zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlin.penalties import Penalty
from torchlin.solvers.precondition import bias_appended, hessian_matrix, is_small
from torchlin.solvers.state import Point, Run

# Largest number of non-zeros for which their equations are solved by one factorisation.
_SUPPORT = 6000
# How many times the alternating steps may go on where there are more, and from which time on the support is polished.
_CHUNKS, _POLISHED = 32, 3
# The share of its distance from optimality that an outer step leaves to its model.
_FORCING = 0.3
# Features of which X̃ᵀX̃ is multiplied in float32, which halves the time and limits the accuracy.
_LARGE = 1024


@dataclass
class Model:
    """q(W) = ⟨−L, W⟩ + ½ ⟨W, H(W)⟩ + λR(W) with H = c·(I − 11ᵀ/k) ⊗ Gram: the data term around a point, and penalty.

    The class matrix I − 11ᵀ/k is right where adding the same number to all scores of a sample changes nothing, as in
    softmax and the multiclass hinges (`coupled`); an L1 penalty, unlike L2, leaves such directions free. Otherwise it
    is I.
    """

    gram: Tensor
    inverse: Tensor
    shift: float
    penalty: Penalty
    coupled: bool
    c: float
    classes: int = 1
    exact: Tensor | None = None
    gram64: Tensor | None = None

    def curved(self, w: Tensor) -> Tensor:
        """The part of W that the scores feel."""
        return w - w.mean(0) if self.coupled else w

    def product(self, w: Tensor) -> Tensor:
        """H(W)."""
        if self.exact is not None:
            return (self.exact @ w.reshape(-1).to(self.exact)).view(w.shape)
        return self.c * (self.curved(w) @ self.gram)

    def resolvent(self, right: Tensor) -> Tensor:
        """(H + ρ)⁻¹ of a right-hand side (k, p)."""
        if self.exact is not None:
            return (self.inverse @ right.reshape(-1)).view(right.shape)
        felt = self.curved(right)
        x = felt @ self.inverse / self.c
        return x + (right - felt) / (self.c * self.shift) if self.coupled else x

    def block(self, row: Tensor, column: Tensor, gram: Tensor) -> Tensor:
        """H between the weights (row, column)."""
        if self.exact is not None:
            index = row * len(gram) + column
            return self.exact[index][:, index]
        same = row.unsqueeze(1) == row.unsqueeze(0)
        block = gram[column][:, column] * self.c
        return block.mul_(same.to(block) - (1 / self.classes if self.coupled else 0.0))

    def alternate(self, w: Tensor, linear: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """ADMM: X minimises the quadratic, Z the penalty, U adds up ρ(X − Z). Returns Z and U."""
        rho = self.c * self.shift
        z = w
        for _ in range(iterations):
            right = linear + rho * z - u
            x = 1.6 * self.resolvent(right) - 0.6 * z
            z = self.penalty.prox(x + u / rho, 1 / rho)
            u = u + rho * (x - z)
        return z, u

    def minimise(self, w: Tensor, linear: Tensor, u: Tensor, accuracy: float, inner: int) -> tuple[Tensor, Tensor]:
        """W with `violation` at most `accuracy`, if that can be had, and the U to go on from."""
        for chunk in range(_CHUNKS):
            w, u = self.alternate(w, linear, u, inner)
            if self.violation(self.product(w) - linear, w) <= accuracy:
                break
            if chunk >= _POLISHED and int((w != 0).sum()) <= _SUPPORT:
                return self.polish(w, linear, accuracy), u
        return w.double(), u

    def violation(self, slope: Tensor, w: Tensor) -> float:
        """How far W is from optimal: the largest distance of −slope from the subgradients of the penalty, slope being
        the gradient of all but the penalty."""
        slope = slope + 2 * self.penalty.l2 * w
        off = torch.where(w == 0, slope.abs() - self.penalty.l1, (slope + self.penalty.l1 * w.sign()).abs())
        return float(off.max().clamp(min=0))

    def polish(self, w: Tensor, linear: Tensor, accuracy: float, rounds: int = 30) -> Tensor:
        """The minimiser of q from a good guess of its support and signs: solve the equations of the support, stop where
        a weight meets zero, drop it, add what violates optimality. q falls at every round."""
        l1, ridge = self.penalty.l1, 2 * self.penalty.l2
        gram = self.gram64 if self.gram64 is not None else self.gram.double()
        w, linear = w.double(), linear.double()
        best = self.value64(w, linear, gram)
        for _ in range(rounds):
            felt = self.product64(w, gram) - linear
            if self.violation(felt, w) <= accuracy:
                return w
            slope = felt + ridge * w
            violation = torch.where(w == 0, slope.abs() - l1, 0.0)
            sign = torch.where(w == 0, torch.where(violation > 1e-9 * l1, -slope.sign(), 0.0), w.sign())
            row, column = sign.nonzero(as_tuple=True)
            if len(row) == 0 or len(row) > _SUPPORT:
                return w
            block = self.block(row, column, gram)
            block.diagonal().add_(ridge + 1e-9 * float(block.diagonal().mean()))
            s = sign[row, column]
            now = w[row, column]
            residual = slope[row, column] + l1 * s
            factor, info = torch.linalg.cholesky_ex(block)
            if int(info):
                return w
            move = -torch.cholesky_solve(residual.unsqueeze(1), factor).squeeze(1)
            # New members must leave zero with the sign they were given.
            move = torch.where((now == 0) & (move * s < 0), 0.0, move)
            crossing = (now + move) * s < 0
            if not bool(crossing.any()):
                trial = w.clone()
                trial[row, column] = now + move
                value = self.value64(trial, linear, gram)
                settled = float(violation.max()) <= 1e-7 * l1
                if value >= best:
                    return w
                w, best = trial, value
                if settled:
                    return w
                continue
            # Either all that crossed stop at zero, or, if that does not descend, the first one does.
            trial = w.clone()
            trial[row, column] = torch.where(crossing, 0.0, now + move)
            value = self.value64(trial, linear, gram)
            if value >= best:
                ratio = torch.where(crossing, -now / torch.where(crossing, move, 1.0), 1.0)
                step = float(ratio.min())
                trial = w.clone()
                trial[row, column] = torch.where(crossing & (ratio <= step), 0.0, now + step * move)
                value = self.value64(trial, linear, gram)
                if value >= best:
                    return w
            w, best = trial, value
        return w

    def product64(self, w: Tensor, gram: Tensor) -> Tensor:
        if self.exact is not None:
            return self.product(w)
        # Only the features in use: few, where it pays.
        used = (w != 0).any(0).nonzero().squeeze(1)
        return self.c * (self.curved(w)[:, used] @ gram[used])

    def value64(self, w: Tensor, linear: Tensor, gram: Tensor) -> float:
        q = 0.5 * self.product64(w, gram) - linear
        return float((w * q).sum()) + float(self.penalty.value(w))


def proximal_newton(
    run: Run, point: Point, gram: Tensor, curvature: float, shift: float = 1.0, inner: int = 25
) -> Point:
    """Minimise F over W until the certified gap is at most `run.tol`.

    An outer step minimises the data term's quadratic model plus the penalty, first by ADMM with one inverse, of
    Gram + shift·I, for all classes and all values of c, then exactly on the support found. No pass over the data is
    needed for it. The zeros are exact. c follows the curvature seen along the last step.

    Args:
        gram: X̃ᵀX̃/N, (p, p).
        curvature: the first c.
    """
    penalty = run.penalty
    assert penalty is not None
    coupled = run.data.outputs > 1 and float(point.gradient.sum(1).abs().max()) < 1e-9
    small = bias_appended(run) if is_small(run) else None
    if small is None:
        kind = torch.float32 if len(gram) > _LARGE else torch.float64
        rounded = gram.to(kind)
        shifted = rounded.clone()
        shifted.diagonal().add_(shift)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        model = Model(rounded, inverse, shift, penalty, coupled, curvature, run.data.outputs, gram64=gram)
    u = torch.zeros_like(point.weight)
    while not run.done(point):
        if small is not None:
            model = _exact_model(run, point, penalty, gram, small, shift)
        kind = model.inverse.dtype
        w, u = point.weight.to(kind), u.to(kind)
        linear = model.product(w) - point.v.to(kind)
        target, u = model.minimise(w, linear, u, _FORCING * model.violation(point.v, point.weight), inner)
        direction = target - point.weight
        change = run.scores(direction)
        metric = float((model.product(direction.to(kind)) * direction).sum()) / model.c
        answer = run.bias.response(point.scores, change, exact=small is not None)
        step, seen = _backtrack(run, point, direction, change + answer, penalty)
        if step == 0:
            if inner > 500:
                break
            inner *= 2
            continue
        weight = target if step == 1 else point.weight + step * direction
        run.bias.value = run.bias.value + step * answer
        point = run.point(weight, torch.add(point.raw, change, alpha=step))
        if metric > 0 and seen > 0:
            model.c = seen / metric
    return point


def _exact_model(run: Run, point: Point, penalty: Penalty, gram: Tensor, x: Tensor, shift: float) -> Model:
    """The model with the true Hessian at a point, the bias eliminated from it."""
    k, width = run.data.outputs, x.shape[1]
    hessian = hessian_matrix(x, run.data.hessians(point.scores, point.gradient)).view(k, width, k, width)
    weights = hessian[:, :-1, :, :-1].reshape(k * (width - 1), -1)
    cross = hessian[:, :-1, :, -1].reshape(-1, k)
    biases = torch.linalg.pinv(hessian[:, -1, :, -1], hermitian=True, rtol=1e-10)
    weights = weights - cross @ biases @ cross.T
    rho = shift * max(float(weights.diagonal().mean()), 1e-12)
    shifted = weights.clone()
    shifted.diagonal().add_(rho)
    inverse = torch.linalg.inv(shifted)
    return Model(gram, inverse, shift, penalty, False, rho / shift, k, weights)


def _backtrack(run: Run, point: Point, direction: Tensor, change: Tensor, penalty: Penalty) -> tuple[float, float]:
    """The step length in (0, 1] and the curvature dᵀ∇²d of the data term seen over it."""
    slope = float((point.v * direction).sum())
    before = float(penalty.value(point.weight))
    decrease = slope + float(penalty.value(point.weight + direction)) - before
    if not decrease < 0:
        return 0.0, 0.0
    step = 1.0
    while step > 1e-6:
        value, slope_there = run.data.along(point.scores, change, step)
        value += float(penalty.value(point.weight + step * direction))
        if value <= point.primal + 0.1 * step * decrease:
            return step, (slope_there - slope) / step
        step /= 2
    return 0.0, 0.0


def accelerated(run: Run, point: Point) -> Point:
    """FISTA with restarts and a step from the curvature along the steps: what is left where no Gram matrix fits.

    Reference: Beck & Teboulle, SIAM J. Imaging Sci. 2 (2009); restarts: O'Donoghue & Candès, FoCM 15 (2015).
    """
    penalty = run.penalty
    assert penalty is not None
    length = 1 / max(run.data.mean_curvature(point.scores, point.gradient), 1e-6)
    previous, momentum = point, 1.0
    at = point
    while not run.done(point):
        while True:
            weight = penalty.prox(at.weight - length * at.v, length)
            direction = weight - at.weight
            raw = run.scores(weight)
            bound = float((at.v * direction).sum()) + float(direction.square().sum()) / (2 * length)
            value = run.data.value(raw + run.bias.value)
            if value <= at.value + bound + 1e-12 * abs(at.value) or run.spent:
                break
            length /= 2
        previous, point = point, run.point(weight, raw)
        if point.primal > previous.primal:
            momentum, at = 1.0, point
            continue
        ahead = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        beta, momentum = (momentum - 1) / ahead, ahead
        if beta == 0:
            at = point
            continue
        at = run.point(
            torch.lerp(previous.weight, point.weight, 1 + beta), torch.lerp(previous.raw, point.raw, 1 + beta)
        )
    return point
