"""One pair of autograd Functions for every loss: the value with its gradient, the gradient with its Hessian product.

A loss brings three methods on rows of scores (see `RowLoss`); what is here is the calculus around them. Row i has the
coefficient c_i (class weight, 0 where the sample does not count) and the output v_i = c_i L_i, so

    backward:         ∂/∂z_i  Σ u_i v_i  =  c_i u_i g_i                 g_i = ∂L_i/∂z_i
    double backward:  of  ⟨t_i, c_i u_i g_i⟩  in z_i:  c_i u_i H_i t_i   in u_i:  c_i ⟨t_i, g_i⟩

`backward` of the first is the second, so second derivatives are exact where L is smooth. For the piecewise linear
losses H is zero away from the kinks and is taken as zero on them.

Nothing saved is ever written to: every in-place operation here or in a loss acts on a tensor made in the same call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class RowLoss(Protocol):
    """The mathematics of a loss on rows: scores (n, k) in float32 or float64, target as the loss encodes it."""

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        """L, (n,)."""

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        """G = ∂L/∂Z, (n, k), a new tensor."""

    def hessian_product(self, scores: Tensor, target: Tensor, vector: Tensor) -> Tensor:
        """Row i: (∂²L_i/∂z_i²) vector_i, (n, k)."""


F = TypeVar("F", bound=Callable[..., Any])


def known_signature(function: F) -> F:
    """Keep a function's signature in it: torch and Lightning ask for that of some functions at every call."""
    vars(function)["__signature__"] = inspect.signature(function)
    return function


def row_values(scores: Tensor, target: Tensor, coefficient: Tensor | None, loss: RowLoss) -> Tensor:
    """c_i L_i, (n,), differentiable in the scores. `coefficient` None means all ones."""
    if torch.compiler.is_compiling():
        # Dynamo refuses a Function that defines jvp; the one without it traces.
        value: Tensor = _Value.apply(scores, target, coefficient, loss)
    else:
        value = _ValueWithJvp.apply(scores, target, coefficient, loss)
    return value


def _row_gradient(
    scores: Tensor, target: Tensor, coefficient: Tensor | None, upstream: Tensor, loss: RowLoss
) -> Tensor:
    """c_i u_i g_i, (n, k), differentiable in the scores and in u."""
    if torch.compiler.is_compiling():
        gradient: Tensor = _Gradient.apply(scores, target, coefficient, upstream, loss)
    else:
        gradient = _GradientWithJvp.apply(scores, target, coefficient, upstream, loss)
    return gradient


def _scale(upstream: Tensor, coefficient: Tensor | None) -> Tensor:
    return upstream if coefficient is None else upstream * coefficient


def masked(rows: Tensor, coefficient: Tensor | None) -> Tensor:
    """Zero, not NaN, where a sample does not count: its scores may be anything."""
    if coefficient is None:
        return rows
    counts = coefficient != 0
    return torch.where(counts if rows.dim() == 1 else counts.unsqueeze(-1), rows, 0)


def _scaled_gradient(
    scores: Tensor, target: Tensor, coefficient: Tensor | None, upstream: Tensor, loss: RowLoss
) -> Tensor:
    gradient = loss.gradient(scores, target)
    scale = _scale(upstream, coefficient).unsqueeze(-1)
    # In place where the upstream gradient is an ordinary tensor; `is_grads_batched=True` hands in a batch of them.
    batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream)
    return masked(gradient * scale if batched else gradient.mul_(scale), coefficient)


class _Value(torch.autograd.Function):
    @staticmethod
    @known_signature
    def forward(scores: Tensor, target: Tensor, coefficient: Tensor | None, loss: RowLoss) -> Tensor:
        value = loss.value(scores, target)
        return value if coefficient is None else masked(value * coefficient, coefficient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.loss = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        scores, target, coefficient = ctx.saved_tensors
        # Without create_graph the second Function has nothing to record and would only cost its overhead.
        rows = _row_gradient if torch.is_grad_enabled() else _scaled_gradient
        return rows(scores, target, coefficient, upstream, ctx.loss), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, loss = inputs
        scores, target, coefficient = _stacked_rows(info.batch_size, in_dims, tensors)
        return row_values(scores, target, coefficient, loss).view(info.batch_size, -1), 0


class _Gradient(torch.autograd.Function):
    @staticmethod
    @known_signature
    def forward(scores: Tensor, target: Tensor, coefficient: Tensor | None, upstream: Tensor, loss: RowLoss) -> Tensor:
        return _scaled_gradient(scores, target, coefficient, upstream, loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.loss = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        scores, target, coefficient, upstream = ctx.saved_tensors
        in_scores = in_upstream = None
        if ctx.needs_input_grad[0]:
            product = ctx.loss.hessian_product(scores, target, tangent)
            in_scores = masked(product * _scale(upstream, coefficient).unsqueeze(-1), coefficient)
        if ctx.needs_input_grad[3]:
            ones = torch.ones_like(upstream)
            in_upstream = (_row_gradient(scores, target, coefficient, ones, ctx.loss) * tangent).sum(-1)
        return in_scores, None, None, in_upstream, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, loss = inputs
        scores, target, coefficient, upstream = _stacked_rows(info.batch_size, in_dims, tensors)
        gradient = _row_gradient(scores, target, coefficient, upstream, loss)
        return gradient.view(info.batch_size, -1, gradient.shape[-1]), 0


class _ValueWithJvp(_Value):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        if tangent is None:
            return None
        scores, target, coefficient = ctx.saved_tensors
        ones = torch.ones_like(scores[:, 0])
        return (_row_gradient(scores, target, coefficient, ones, ctx.loss) * tangent).sum(-1)


class _GradientWithJvp(_Gradient):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: Any, __: Any, upstream_tangent: Tensor | None, *___: Any) -> Tensor:
        scores, target, coefficient, upstream = ctx.saved_tensors
        out = torch.zeros_like(scores)
        if tangent is not None:
            product = ctx.loss.hessian_product(scores, target, tangent)
            out = out + masked(product * _scale(upstream, coefficient).unsqueeze(-1), coefficient)
        if upstream_tangent is not None:
            out = out + _row_gradient(scores, target, coefficient, upstream_tangent, ctx.loss)
        return out


def _stacked_rows(batch: int, in_dims: tuple[Any, ...], tensors: list[Any]) -> list[Any]:
    """(B, n, …) per tensor → (B·n, …): the losses act row by row, so a batch of batches is one longer batch."""
    stacked: list[Any] = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is None:
            stacked.append(None)
            continue
        moved = tensor.movedim(dim, 0) if dim is not None else tensor.expand(batch, *tensor.shape)
        stacked.append(moved.reshape(-1, *moved.shape[2:]))
    return stacked
