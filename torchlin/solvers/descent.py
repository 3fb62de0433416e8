"""Gradient descent as the textbook writes it, for any differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Trace(NamedTuple):
    """The path of a descent: points (steps + 1, *shape of w), values and gradient norms (steps + 1,), and why it ended:
    "gradient", "change" or "max_steps"."""

    points: Tensor
    values: Tensor
    gradient_norms: Tensor
    stopped: str

    @property
    def solution(self) -> Tensor:
        return self.points[-1]

    @property
    def converged(self) -> bool:
        return self.stopped != "max_steps"


def gradient_descent(
    f: Callable[[Tensor], Tensor], w0: Tensor | float, lr: float, tol: float = 1e-6, max_steps: int = 10_000
) -> Trace:
    """Repeat w ← w − lr·∇f(w) until the gradient or the change in w is small.

    Args:
        f: a function of one tensor that returns a scalar, differentiable by autograd.
        w0: where to start, any shape; not changed.
        lr: the learning rate, a positive number. Below 2/L it descends, L the Lipschitz constant of ∇f.
        tol: stop when ‖∇f(w)‖ ≤ tol or ‖change in w‖ ≤ tol.
        max_steps: stop in any case after this many steps; `Trace.converged` is then False.

    Raises:
        ValueError: lr or tol not positive, f not scalar.
        FloatingPointError: f became NaN or infinite; the message names the step and the rate.
    """
    if not lr > 0 or not tol > 0:
        raise ValueError(f"lr and tol are positive, got lr={lr}, tol={tol}")
    w = torch.as_tensor(w0).detach().clone()
    w = w if w.is_floating_point() else w.to(torch.get_default_dtype())
    points, values, norms, stopped = [w], [], [], "max_steps"
    for step in range(max_steps + 1):
        at = w.detach().requires_grad_()
        value = f(at)
        if value.numel() != 1:
            raise ValueError(f"f returns a scalar, got shape {tuple(value.shape)}")
        if not bool(value.isfinite()):
            raise FloatingPointError(f"f is {value.item()} at step {step} with lr={lr}: try a smaller lr")
        (gradient,) = torch.autograd.grad(value.sum(), at)
        values.append(value.detach().reshape(()))
        norms.append(gradient.norm())
        if norms[-1] <= tol:
            stopped = "gradient"
            break
        if len(points) > 1 and (points[-1] - points[-2]).norm() <= tol:
            stopped = "change"
            break
        if step < max_steps:
            w = w - lr * gradient
            points.append(w)
    return Trace(torch.stack(points), torch.stack(values), torch.stack(norms), stopped)
