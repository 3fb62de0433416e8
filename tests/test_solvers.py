"""Gradient descent as the textbook writes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlin import gradient_descent
from torchlin.losses import SoftmaxLoss


def parabola(w: Tensor) -> Tensor:
    return w**2 + 3


def bowl(w: Tensor) -> Tensor:
    return (w[0] - 2) ** 2 + (w[1] + 3) ** 2


def test_parabola_from_two() -> None:
    trace = gradient_descent(parabola, 2.0, lr=0.1)
    assert trace.converged
    assert float(trace.solution) == pytest.approx(0, abs=1e-5)
    assert float(trace.values[0]) == 7
    assert float(trace.gradient_norms[0]) == 4
    assert trace.points[:3].tolist() == pytest.approx([2.0, 1.6, 1.28])
    assert bool((trace.values.diff() <= 0).all())


def test_bowl_in_two_dimensions() -> None:
    start = torch.tensor([10.0, 10.0], dtype=torch.float64)
    trace = gradient_descent(bowl, start, lr=0.2, tol=1e-9)
    assert trace.solution.tolist() == pytest.approx([2.0, -3.0], abs=1e-8)
    assert trace.points.dtype == torch.float64
    assert start.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("start", [2.0, torch.tensor([1.0, 2.0]), torch.ones(2, 3)], ids=["number", "vector", "matrix"])
def test_trace_shapes(start: Any) -> None:
    trace = gradient_descent(lambda w: (w**2).sum(), start, lr=0.25, max_steps=5)
    steps = len(trace.values)
    assert trace.points.shape == (steps, *torch.as_tensor(start).shape)
    assert trace.values.shape == trace.gradient_norms.shape == (steps,)
    assert torch.equal(trace.points[0], torch.as_tensor(start))
    assert torch.equal(trace.solution, trace.points[-1])
    for w, value, norm in zip(trace.points, trace.values, trace.gradient_norms, strict=True):
        torch.testing.assert_close(value, (w**2).sum())
        torch.testing.assert_close(norm, (2 * w).norm())


def test_it_stops_on_the_gradient() -> None:
    trace = gradient_descent(parabola, 2.0, lr=0.45, tol=1e-3)
    assert trace.stopped == "gradient"
    assert float(trace.gradient_norms[-1]) <= 1e-3 < float(trace.gradient_norms[-2])


def test_it_stops_on_the_change() -> None:
    trace = gradient_descent(parabola, 2.0, lr=1e-4, tol=1e-3)
    assert trace.stopped == "change"
    assert trace.converged
    assert float((trace.points[-1] - trace.points[-2]).norm()) <= 1e-3 < float(trace.gradient_norms[-1])


def test_it_stops_after_max_steps_and_says_so() -> None:
    trace = gradient_descent(parabola, 2.0, lr=0.01, max_steps=3)
    assert (trace.stopped, trace.converged) == ("max_steps", False)
    assert trace.points.shape == (4,)


def test_a_start_at_the_minimum_takes_no_step() -> None:
    trace = gradient_descent(parabola, 0.0, lr=0.1)
    assert trace.stopped == "gradient"
    assert trace.points.tolist() == [0.0]
    assert len(gradient_descent(parabola, 2.0, lr=0.1, max_steps=0).points) == 1


def test_it_minimises_a_loss_of_the_package() -> None:
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3

    def objective(w: Tensor) -> Tensor:
        return SoftmaxLoss()(x @ w.T, y) + 0.1 * w.square().sum()

    trace = gradient_descent(objective, torch.zeros(3, 4, dtype=torch.float64), lr=0.5, tol=1e-8)
    at = trace.solution.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(at), at)
    assert float(gradient.norm()) < 1e-6


@pytest.mark.parametrize(("lr", "tol"), [(0, 1e-6), (-1.0, 1e-6), (math.nan, 1e-6), (0.1, 0), (0.1, -1.0)])
def test_rates_and_tolerances_are_positive(lr: float, tol: float) -> None:
    with pytest.raises(ValueError, match=f"lr and tol are positive, got lr={lr}, tol={tol}"):
        gradient_descent(parabola, 2.0, lr=lr, tol=tol)


def test_divergence_names_the_step_and_the_rate() -> None:
    with pytest.raises(FloatingPointError, match=r"f is inf at step \d+ with lr=10: try a smaller lr"):
        gradient_descent(parabola, 2.0, lr=10)
    with pytest.raises(FloatingPointError, match="f is nan at step 0"):
        gradient_descent(torch.log, -1.0, lr=0.1)


def test_f_returns_a_scalar() -> None:
    with pytest.raises(ValueError, match=r"f returns a scalar, got shape \(2,\)"):
        gradient_descent(lambda w: w**2, torch.ones(2), lr=0.1)
