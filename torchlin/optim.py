"""Penalties in weight-decay style: a proximal step after every step of an ordinary torch optimizer.

Why not a plain proximal step. After a step w ← w − ηg the plain method soft-thresholds w at ηλ. With the gradient of
a mini-batch that leaves no zeros: the noise moves a weight by several times ηλ at every step, whatever η is. What
averages out is the *sum* of the steps. So the L1 part keeps account: u is the penalty a weight could have paid so far,
q (one number per weight) what it did pay, and the weight without any penalty would stand at w − q. Each step sets

    u ← ρu + ηλ,   z = w − ρq,   w ← soft_threshold(z, u),   q ← w − z            ρ = 1 − 1/window

A weight at zero stays at exactly zero until the gradients it has seen, in sum, exceed the penalties it was spared, so
zeros survive the noise. With ρ = 1 this is the cumulative penalty of Tsuruoka, Tsujii and Ananiadou (ACL 2009), which
for fixed η is dual averaging (Xiao, JMLR 11, 2010) around the optimizer's own path; with ρ = 0 it is the plain
proximal step. In between, accounts older than `window` steps are forgotten, so a weight that should have stood at zero
early on and not later owes no more than a window's penalty. The natural window is one epoch: the gradients of an epoch
sum to the gradient of the whole data, and for full-batch steps (window 1) the plain proximal method is left.

For every ρ a stationary point is one where gradient step and penalty cancel, g = −λ sign(w), or where w = 0 and
|g| ≤ λ: the minimiser of F.

The L2 part needs no account: it shrinks w by 1/(1 + 2ηλ) at every step.

What η is. λ must be weighed with the step that the optimizer itself gives a constant gradient, or another objective is
minimised: lr (1 − dampening)/(1 − momentum) for SGD, and the elementwise lr/(√v̂ + ε) for the adaptive ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlin.penalties import Penalty, shrink, soft_threshold

Group = dict[str, Any]
State = dict[str, Any]
EffectiveStep = Callable[[Group, State], float | Tensor]


class PenalizedHead(Protocol):
    """A head says which part of its weight a penalty may touch."""

    weight: Tensor

    def penalized(self, like_weight: Tensor) -> Tensor: ...


class Strengths(Protocol):
    """λα and λ(1 − α), as a `Penalty` has them: numbers, or tensors that broadcast against the penalised weight."""

    @property
    def l1(self) -> float | Tensor: ...

    @property
    def l2(self) -> float | Tensor: ...


# The effective step: how far a parameter moves per unit of a gradient that stays the same.


def sgd_step(group: Group, state: State) -> float | Tensor:
    if group["momentum"] == 0:
        return _rate(group)
    gain: float = (1 - group["dampening"]) / (1 - group["momentum"])
    return _rate(group) * gain


def _adam_step(group: Group, state: State) -> float | Tensor:
    _, beta2 = group["betas"]
    second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    corrected = 1 - beta2 ** float(state["step"])
    scale: Tensor = second.sqrt() / math.sqrt(corrected) + group["eps"]
    return _rate(group) / scale


def _rmsprop_step(group: Group, state: State) -> float | Tensor:
    scale: Tensor = state["square_avg"].sqrt() + group["eps"]
    gain: float = 1 / (1 - group["momentum"])
    return _rate(group) * gain / scale


def _adagrad_step(group: Group, state: State) -> float | Tensor:
    decayed: float = 1 + (float(state["step"]) - 1) * group["lr_decay"]
    scale: Tensor = state["sum"].sqrt() + group["eps"]
    return _rate(group) / decayed / scale


def _rate(group: Group) -> float | Tensor:
    rate: float | Tensor = group["lr"]
    return rate


EFFECTIVE_STEPS: dict[type[torch.optim.Optimizer], EffectiveStep] = {
    torch.optim.SGD: sgd_step,
    torch.optim.Adam: _adam_step,
    torch.optim.AdamW: _adam_step,
    torch.optim.RMSprop: _rmsprop_step,
    torch.optim.Adagrad: _adagrad_step,
}

# Keys in the optimizer's own state of the weight, so that its state_dict carries them.
_LEVY = "penalty_levy"  # u
_PAID = "penalty_paid"  # q


def apply_penalty(
    optimizer: torch.optim.Optimizer, head: PenalizedHead, penalty: Penalty, *, window: int = 1000
) -> torch.utils.hooks.RemovableHandle:
    """Make every `optimizer.step()` also take the proximal step of `penalty` on the head's weight.

    The optimizer minimises (1/n) Σ L and the penalty is added here, in the optimizer's own step lengths, so together
    they minimise F = (1/n) Σ L + λ R(W). L1 and elastic net give exact zeros. The optimizer object is the same as
    before: schedulers, GradScaler (a skipped step skips the penalty), gradient accumulation and Lightning work
    unchanged. What the penalty remembers is in `optimizer.state_dict()`, so resuming keeps it; call `apply_penalty`
    again on the new optimizer before or after `load_state_dict`. A copy of the optimizer (deepcopy, pickle) has no
    hooks, so it has no penalty: apply it again there too. A penalty of your own that overrides `prox` is applied as it
    is at every step.

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop or Adagrad, holding `head.weight`.
        head: a `LinearHead` (or anything with `weight` and `penalized`); its bias is never touched.
        penalty: `L2`, `L1` or `ElasticNet`.
        window: how many steps the account of the L1 part reaches back; the number of steps in an epoch is right, 1 for
            full-batch steps. `LinearClassifier` sets it itself. It does not matter for L2.

    Returns:
        A handle whose `remove()` takes the penalty away again.

    Raises:
        TypeError: another optimizer (its effective step is not known), or a head that does not say what is penalised.
        ValueError: the optimizer does not hold the weight, already penalises it, maximises, or has a non-zero
            weight_decay in the group that holds it; RMSprop(centered=True), whose step grows without bound as the
            gradient settles; an L1 part on half-precision weights; window < 1.
    """
    check_window(window)
    effective_step = EFFECTIVE_STEPS.get(known_class(optimizer))
    if effective_step is None:
        known = ", ".join(cls.__name__ for cls in EFFECTIVE_STEPS)
        raise TypeError(
            f"a penalty cannot be applied through {type(optimizer).__name__}: its effective step length is not known; "
            f"use one of {known}, or add penalty.value(head.weight) to the loss"
        )
    if not hasattr(head, "penalized"):
        raise TypeError(
            f"apply_penalty takes a head that says which of its parameters are penalised, got {type(head).__name__}: "
            "use torchlin.LinearHead, which is an nn.Linear"
        )
    weight = head.weight
    _check_group(group_of(optimizer, weight, "head.weight"), penalty)
    if penalty.l1 > 0 and weight.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"head.weight is {weight.dtype}, in which the small sums of an L1 penalty are lost: keep the head in "
            "float32 (in Lightning precision='bf16-mixed' instead of 'bf16-true')"
        )
    if any(getattr(hook, "weight", None) is weight for hook in optimizer._optimizer_step_post_hooks.values()):
        raise ValueError("head.weight already has a penalty in this optimizer: remove() the first, or use one penalty")

    # A penalty of the user's own moves the weights as it says: nobody else can keep its account.
    own_prox = None if type(penalty).prox is Penalty.prox else penalty.prox
    return optimizer.register_step_post_hook(ProximalStep(head, penalty, effective_step, window, own_prox))


class ProximalStep:
    """The hook: a callable object, so that it can be recognised among an optimizer's hooks.

    Args:
        head: whose weight is moved.
        penalty: the strengths; whether there is any L1 part is read once, here.
        effective_step: η, a number or a tensor shaped like the weight or broadcasting against it.
        window: see `apply_penalty`.
        own_prox: a proximal map to apply in place of the account.
    """

    def __init__(
        self,
        head: PenalizedHead,
        penalty: Strengths,
        effective_step: EffectiveStep,
        window: int,
        own_prox: Callable[[Tensor, float | Tensor], Tensor] | None = None,
    ) -> None:
        self.window = window
        self.head = head
        self.weight = head.weight
        self.penalty = penalty
        self.effective_step = effective_step
        self.own_prox = own_prox
        self.levies = bool(torch.as_tensor(penalty.l1 != 0).any())

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.weight.grad is None or _skipped(optimizer):
            return  # the optimizer left it alone, so there is no step to go with
        group = group_of(optimizer, self.weight, "head.weight")
        _check_group(group, self.penalty)
        state = optimizer.state[self.weight]
        step = self.effective_step(group, state)
        if isinstance(step, Tensor) and step.dim() > 0:
            step = self.head.penalized(step)
        w = self.head.penalized(self.weight)
        w.copy_(self._moved(w, step, state) if self.own_prox is None else self.own_prox(w, step))

    def _moved(self, w: Tensor, step: float | Tensor, state: State) -> Tensor:
        levied = self._levied(w, step, state) if self.levies else w
        return shrink(levied, step * self.penalty.l2)

    def _levied(self, w: Tensor, step: float | Tensor, state: State) -> Tensor:
        if _PAID not in state:
            state[_PAID] = torch.zeros_like(self.weight)
            state[_LEVY] = torch.zeros_like(self.weight)
        levy, paid = self.head.penalized(state[_LEVY]), self.head.penalized(state[_PAID])
        levy.mul_(1 - 1 / self.window).add_(step * self.penalty.l1)
        paid.mul_(1 - 1 / self.window)
        unpenalized = w - paid
        moved = soft_threshold(unpenalized, levy)
        paid.copy_(moved - unpenalized)
        return moved


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step found an overflow: GradScaler calls a fused optimizer all the same, which then does nothing."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def known_class(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """The class whose update rule an optimizer has: it itself or what it extends, whichever of them is known first.

    One of torch's own that has no effective step here is known to have another rule, whatever it extends.
    """
    return next(
        cls for cls in type(optimizer).__mro__ if cls in EFFECTIVE_STEPS or cls.__module__.startswith("torch.optim")
    )


def check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window is a number of steps, at least 1, got {window}")


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Group:
    """The parameter group that holds a parameter, `name` in the error if none does."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    raise ValueError(
        f"the optimizer does not hold {name}: build it from parameters that include the {name.split('.')[0]}'s"
    )


def _check_group(group: Group, penalty: Strengths) -> None:
    decay = group.get("weight_decay", 0)
    if decay != 0:
        default = " (AdamW's default)" if decay == 0.01 else ""
        raise ValueError(
            f"weight_decay={decay}{default} on head.weight under {penalty}: "
            "give the head its own group with weight_decay=0"
        )
    if group.get("centered", False):
        raise ValueError(
            "RMSprop(centered=True) divides by the spread of the gradient, which vanishes as it settles: "
            "use centered=False"
        )
    if group.get("maximize", False):
        raise ValueError("maximize=True with a penalty would not minimise the objective: negate the loss instead")
