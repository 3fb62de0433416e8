"""Many linear heads of one width trained at once: a sweep over learning rates, penalties and feature sets in one run.

The heads of one feature set are one matrix product, [W_1; …; W_H] Xᵀ, so fifty heads cost little more arithmetic than
one head with fifty times the classes, and none of the fifty times the overhead.

How each head keeps its own learning rate. A step of SGD is linear in the gradients it has seen,

    v ← μv + (1 − τ)g,   w ← w − ηv   (Nesterov: w − η(g + μv))

so with lr_h·g in place of g everything that moves head h is multiplied by lr_h, and it goes where SGD(lr=η·lr_h) would
take it alone. The gradient that reaches `HeadBank.weight` is therefore the gradient *times the head's learning rate*;
η, the optimizer's own lr, is a factor common to all, for a schedule. The penalties weigh λ_h with the same η·lr_h. An
optimizer that divides by the size of the gradient (Adam) would cancel lr_h, and is refused.

No number of one head enters the arithmetic of another, so a head that diverges harms none. Its gradient is set to zero
all the same: the norm of all gradients, or a GradScaler, would carry a NaN to the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlin.heads import Init, LinearHead, without_autocast
from torchlin.loss import Loss
from torchlin.optim import Group, ProximalStep, State, check_window, group_of, known_class, sgd_step
from torchlin.penalties import Penalty
from torchlin.registry import nearest

# After so many steps weights are looked at, and a GPU is asked for the names of those that diverged.
_LOOK_EVERY = 100


class HeadBank(nn.Module):
    """H linear heads z = W_h x + b_h, each with a learning rate, a penalty and a feature set of its own.

        bank = HeadBank(384, 10, lr=[0.1, 0.01, 0.1, 0.01], feature_set=[0, 0, 1, 1])
        optimizer = torch.optim.SGD(bank.parameters(), lr=1.0, momentum=0.9)
        bank.attach(optimizer)
        for x, y in batches:                       # x (2, b, 384): one (b, 384) for each feature set
            optimizer.zero_grad()
            bank.losses(x, y, SoftmaxLoss()).sum().backward()
            optimizer.step()
        head = bank.head("lr=0.1 set=1")

    Every head ends where it would have ended alone, with `apply_penalty` and SGD(lr=lr[h]) and the same momentum. The
    optimizer's lr is a common factor; give it a schedule that starts at 1.

    Args:
        in_features: p, the same for all feature sets.
        num_classes: k, the number of scores (1 for the logistic loss: `loss.outputs(2)`).
        lr: the learning rate of each head; its length is H.
        penalty: one for all heads, or one for each (None: no penalty).
        feature_set: s(h), which of the S inputs head h reads; None if there is one for all. It is fastest if the heads
            of a set are listed together and every set has as many.
        names: the default is made of lr, penalty and feature set, as in "lr=0.1 L2(strength=0.01) set=3".
        init: as for `LinearHead`.
        dtype: float32 or float64.

    Input x is (b, p), or (S, b, p) where there are several feature sets: floating point, computed in the precision of
    the weights under autocast too, or uint8 pixels, read as x/255. Output (H, b, k). No gradient flows to x.

    Attributes:
        weight, bias: (H, k, p) and (H, k). Their `grad` is the gradient times `lr`.
        names, penalties, feature_set: tuples.
        lr: (H,).
        alive: (H,) bool; False for a head that was dropped because its loss or its weights were not finite. Its
            gradient is zero, its loss ∞, and its weights mean nothing. A warning names it, at once on a CPU and within
            100 steps on a GPU, which is asked no sooner.

    Raises:
        ValueError: sizes below 1, no heads, lists of different lengths, a learning rate that is not positive and
            finite, feature sets that are not 0 … S − 1, two heads of one name, a half precision dtype; input of
            another shape or that requires grad.
        TypeError: a penalty that is not of the family of `Penalty`; input of integers other than uint8.
        RuntimeError: a backward pass before `attach`, whatever the loss.
        FloatingPointError: in `optimizer.step()`, once all heads have diverged.
    """

    alive: Tensor
    lr: Tensor
    _l1: Tensor
    _l2: Tensor
    _order: Tensor
    _place: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        lr: Sequence[float],
        penalty: Penalty | Sequence[Penalty | None] | None = None,
        feature_set: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        init: Init = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rates = _checked_rates(lr)
        self.penalties = _one_each(penalty, len(rates))
        self.feature_set = (0,) * len(rates) if feature_set is None else tuple(map(int, feature_set))
        for argument, items in (("penalty", self.penalties), ("feature_set", self.feature_set), ("names", names)):
            if items is not None and len(items) != len(rates):
                raise ValueError(f"lr lists {len(rates)} heads and {argument} {len(items)}: give one for each head")
        for each in self.penalties:
            _check_penalty(each)
        self._counts = _counted(self.feature_set)
        heads = list(zip(rates, self.penalties, self.feature_set, strict=True))
        self.names = tuple(_name(*head, len(self._counts)) for head in heads) if names is None else tuple(names)
        _check_unique(self.names)
        self._told = [
            f"{name!r} (lr, penalty, feature_set = {head})" for name, head in zip(self.names, heads, strict=True)
        ]

        made = [LinearHead(in_features, num_classes, True, init, device, dtype) for _ in rates]
        self.in_features, self.num_classes = in_features, num_classes
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in made]))
        self.bias = nn.Parameter(torch.stack([head.bias.detach() for head in made]))
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is float32 or float64, got {self.weight.dtype}; half precision input is fine")
        self.register_buffer("alive", torch.ones(len(rates), dtype=torch.bool, device=device))
        # What the constructor was told is not loaded, only compared (`set_extra_state`).
        per_head = {
            "lr": rates,
            "_l1": [0.0 if each is None else each.l1 for each in self.penalties],
            "_l2": [0.0 if each is None else each.l2 for each in self.penalties],
        }
        for name, numbers in per_head.items():
            self.register_buffer(name, self.bias.new_tensor(numbers), persistent=False)
        # Heads set after set, and where each is then found.
        order = torch.tensor(sorted(range(len(rates)), key=self.feature_set.__getitem__), device=device)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_place", order.argsort(), persistent=False)
        self._listed_by_set = list(self.feature_set) == sorted(self.feature_set)
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def feature_sets(self) -> int:
        """S."""
        return len(self._counts)

    # Training.

    def attach(self, optimizer: torch.optim.Optimizer, *, window: int = 1000) -> torch.utils.hooks.RemovableHandle:
        """Make every `optimizer.step()` also take the heads' proximal steps, and report those that have diverged.

        No gradient is computed before this was done, so it cannot be forgotten. What the penalties remember is in
        `optimizer.state_dict()`, as with `apply_penalty`. Copies of bank or optimizer are not attached: do it again.

        Args:
            optimizer: `torch.optim.SGD`, with momentum, Nesterov and dampening as you like, holding `weight` and
                `bias`. Its lr is a factor of all learning rates.
            window: how many steps the account of the L1 parts reaches back, see `apply_penalty`: those of an epoch.

        Returns:
            A handle whose `remove()` takes it all away again.

        Raises:
            TypeError: another optimizer.
            ValueError: the optimizer does not hold the parameters, maximises, or has a weight_decay that is not 0; the
                bank is attached already; window < 1.
        """
        check_window(window)
        if known_class(optimizer) is not torch.optim.SGD:
            raise TypeError(
                f"a HeadBank cannot be trained with {type(optimizer).__name__}: each head's learning rate comes with "
                "its gradient, and only the step of SGD is proportional to that: use torch.optim.SGD"
            )
        if self._attached():
            raise ValueError("the bank is attached to an optimizer already: remove() what attach returned first")
        self._check_groups(optimizer)
        self._handle = optimizer.register_step_post_hook(_BankStep(self, window))
        return self._handle

    def losses(self, x: Tensor, target: Tensor, loss: Loss) -> Tensor:
        """The mean loss of each head, (H,), averaged as `loss` averages; `.sum().backward()` trains all.

        Scores and gradients of all heads are computed at once. Differentiable once. With gradients on, heads whose
        loss is not finite are dropped. A dropped head has loss ∞, so it is never the best: log `losses[bank.alive]`.

        Args:
            x: see the class.
            target: (b,), any integer dtype.
            loss: a loss with `reduction="mean"`; its class weights, `ignore_index` and other options all count.

        Raises:
            ValueError: shapes that do not fit, a target out of range, a loss for another number of scores, another
                reduction.
            TypeError: a target that is not integers.
        """
        if loss.reduction != "mean":
            raise ValueError(f"losses are means over the batch, got a loss with reduction={loss.reduction!r}")
        inputs = self._inputs(x)
        _check_target(target, inputs.shape[1])
        if torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad):
            means: Tensor = _Losses.apply(self.weight, self.bias, inputs, target, loss, self)
            return means
        rows = _Rows(self._scores(self.weight, self.bias, inputs), target, loss)
        return rows.means(loss.value(rows.scores, rows.target)).masked_fill(~self.alive, math.inf)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (H, b, k), a view of (H, k, b)."""
        scores: Tensor = _Scores.apply(self.weight, self.bias, self._inputs(x), self)
        return scores.mT

    # What came of it.

    @property
    def diverged(self) -> list[str]:
        """The names of the heads that were dropped, up to now (which a GPU is asked for)."""
        self._drop_infinite_weights()
        return [name for name, alive in zip(self.names, self.alive.tolist(), strict=True) if not alive]

    @torch.no_grad()
    def head(self, which: int | str) -> LinearHead:
        """A copy of one head, by number or name.

        Raises:
            ValueError: no such head, or one that has diverged.
        """
        index = self._index(which) if isinstance(which, str) else which
        if not 0 <= index < len(self):
            raise ValueError(f"there is no head {index}: the bank has heads 0 … {len(self) - 1}")
        weight, bias = self.weight[index], self.bias[index]
        if not bool(self.alive[index] & weight.isfinite().all() & bias.isfinite().all()):
            raise ValueError(f"head {index}, {self.names[index]!r}, diverged: train it with a smaller learning rate")
        head = LinearHead(self.in_features, self.num_classes, device=weight.device, dtype=weight.dtype)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        return head

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"no head is named {name!r}{nearest(name, self.names)}; bank.names lists them")
        return self.names.index(name)

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"heads": list(self._told)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Compare whose state it is: weights are never loaded as those of other heads.

        Raises:
            ValueError: the state of a bank with other heads.
        """
        # Another number of heads is another shape of weights, which torch has found already.
        for index, (theirs, ours) in enumerate(zip(state["heads"], self._told, strict=False)):
            if theirs != ours:
                raise ValueError(f"head {index} of the state is {theirs}, and of this bank {ours}: build it alike")
        self._reported = set(self.diverged)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}  # a copy has no optimizer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, heads={len(self)}, "
            f"feature_sets={self.feature_sets}"
        )

    # Inside.

    def _inputs(self, x: Tensor) -> Tensor:
        """x as (S, b, p), in the precision of the weights."""
        sets, p = self.feature_sets, self.in_features
        stacked = x.unsqueeze(0) if x.dim() == 2 and sets == 1 else x
        if stacked.dim() != 3 or (stacked.shape[0], stacked.shape[2]) != (sets, p):
            expected = f"(b, {p})" if sets == 1 else f"({sets}, b, {p}), one (b, {p}) for each feature set"
            raise ValueError(f"x has shape {tuple(x.shape)}; this bank takes {expected}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires grad, but a bank trains heads on fixed features: pass x.detach()")
        if x.dtype == torch.uint8:
            return stacked.to(self.weight.dtype) / 255
        if not x.is_floating_point():
            raise TypeError(f"x is floating point, or pixels as uint8, got {x.dtype}")
        return stacked.to(self.weight.dtype)

    def _scores(self, weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
        """(H, k, b), from inputs (S, b, p)."""
        return self._product(weight, inputs.mT).add_(bias.unsqueeze(-1))

    def _product(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Row block h of rows (H, k, m) times the matrix s(h) of inputs (S, m, n): (H, k, n)."""
        h, k, m = rows.shape
        sorted_rows = rows if self._listed_by_set else rows.index_select(0, self._order)
        with without_autocast(inputs.device.type):
            if len(set(self._counts)) == 1:
                out = torch.bmm(sorted_rows.reshape(len(inputs), h // len(inputs) * k, m), inputs)
            else:
                blocks = zip(sorted_rows.split(self._counts), inputs, strict=True)
                out = torch.cat([block.flatten(0, 1) @ matrix for block, matrix in blocks])
        out = out.view(h, k, inputs.shape[-1])
        return out if self._listed_by_set else out.index_select(0, self._place)

    def _attached(self) -> bool:
        hooks = None if self._handle is None else self._handle.hooks_dict_ref()
        return self._handle is not None and hooks is not None and self._handle.id in hooks

    def _check_attached(self) -> None:
        if not self._attached():
            raise RuntimeError(
                "the bank has no optimizer, so penalties would not be applied: "
                "call bank.attach(optimizer) once before training"
            )

    def _check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.named_parameters():
            group = group_of(optimizer, parameter, f"bank.{name}")
            decay = group["weight_decay"]
            if decay != 0:
                raise ValueError(
                    f"weight_decay={decay} on bank.{name} would act at the optimizer's lr and not at each head's: "
                    f"use weight_decay=0 and penalty=L2({decay / 2})"
                )
            if group["maximize"]:
                raise ValueError("maximize=True with a HeadBank would not minimise the losses: negate them instead")

    @torch.no_grad()
    def _drop_infinite_weights(self) -> None:
        for parameter in (self.weight, self.bias):
            # A tenth of the time of asking each number; a NaN is the largest and the smallest of all.
            numbers = parameter.flatten(1)
            self.alive.logical_and_(numbers.amax(1).isfinite()).logical_and_(numbers.amin(1).isfinite())

    def _report(self) -> None:
        fallen = [name for name, alive in zip(self.names, self.alive.tolist(), strict=True) if not alive]
        news = [name for name in fallen if name not in self._reported]
        if not news:
            return
        self._reported.update(news)
        if len(fallen) == len(self):
            raise FloatingPointError("every head has diverged: use smaller learning rates, or look for NaN in x")
        warnings.warn(
            f"{len(news)} of {len(self)} heads diverged and are dropped: {', '.join(map(repr, news))}",
            RuntimeWarning,
            stacklevel=4,  # where the user calls optimizer.step()
        )


class _BankStep:
    """The hook that `attach` registers; to the proximal step it is head and penalty in one."""

    def __init__(self, bank: HeadBank, window: int) -> None:
        self.bank = bank
        self.weight: Tensor = bank.weight
        self.steps = 0
        penalised = any(penalty is not None and penalty.strength > 0 for penalty in bank.penalties)
        self.proximal = ProximalStep(self, self, self._effective_step, window) if penalised else None

    @property
    def l1(self) -> Tensor:
        return self.bank._l1.view(-1, 1, 1)

    @property
    def l2(self) -> Tensor:
        return self.bank._l2.view(-1, 1, 1)

    def penalized(self, like_weight: Tensor) -> Tensor:
        return like_weight

    def _effective_step(self, group: Group, state: State) -> Tensor:
        return sgd_step(group, state) * self.bank.lr.view(-1, 1, 1)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        bank = self.bank
        bank._check_groups(optimizer)
        if self.proximal is not None:
            self.proximal(optimizer, args, kwargs)
        self.steps += 1
        due = self.steps % _LOOK_EVERY == 0
        if due:
            bank._drop_infinite_weights()
        if due or bank.alive.device.type == "cpu":
            bank._report()


class _Scores(torch.autograd.Function):
    """Scores of all heads, (H, k, b)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, inputs: Tensor, bank: HeadBank) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.bank = bank
        return bank._scores(weight, bias, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_in_parameters(ctx, gradient * ctx.bank.lr.view(-1, 1, 1)), None, None


class _Rows:
    """What a loss sees of all heads: `scores` (H·b, k), `target` repeated for each, and what makes means of its values.

    The scores are held class after class, so that sums over classes add whole rows of samples.
    """

    def __init__(self, scores: Tensor, target: Tensor, loss: Loss) -> None:
        self.heads, outputs, self.samples = scores.shape
        # Once for all heads: they have the target in common.
        (encoded, self.coefficient, _), total, _ = loss.prepare(scores[0].t(), target)
        self.share = 1 / (torch.where(total > 0, total, 1) if isinstance(total, Tensor) else max(total, 1))
        self.scores = scores.transpose(0, 1).reshape(outputs, self.heads * self.samples).t()
        self.target = encoded.expand(self.heads, *encoded.shape).flatten(0, 1)

    def means(self, values: Tensor) -> Tensor:
        """(H,), from one value per row."""
        values = values.view(self.heads, self.samples)
        if self.coefficient is not None:
            values = torch.where(self.coefficient != 0, values * self.coefficient, 0)
        return values.sum(1) * self.share


class _Losses(torch.autograd.Function):
    """Mean losses of all heads, (H,): scores, losses and G = ∂L/∂Z in one go, and one product left for backward.

    With c_i the coefficient of sample i, N what the mean divides by and u_h the upstream gradient, backward is that of
    the scores for lr_h u_h c_i/N G, and every head has its own factor anyway, so its learning rate costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, inputs: Tensor, target: Tensor, loss: Loss, bank: HeadBank
    ) -> Tensor:
        rows = _Rows(bank._scores(weight, bias, inputs), target, loss)
        values, gradient = loss.value_and_gradient(rows.scores, rows.target)
        means = rows.means(values)
        bank.alive.logical_and_(means.abs() < math.inf)
        dead = ~bank.alive
        gradient = gradient.unflatten(0, (rows.heads, rows.samples)).mT
        # Zero, not 0·NaN. Asking a GPU whether there is anything to do would make it wait.
        if gradient.device.type != "cpu" or bool(dead.any()):
            gradient.masked_fill_(dead.view(-1, 1, 1), 0)
        if rows.coefficient is not None:
            gradient.masked_fill_(rows.coefficient == 0, 0)
        ctx.save_for_backward(inputs)
        ctx.bank, ctx.gradient, ctx.dead = bank, gradient, dead
        ctx.share = rows.share if rows.coefficient is None else rows.coefficient * rows.share
        return means.masked_fill_(dead, math.inf)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Nor 0·∞: what a user makes of the loss of a dropped head may have any gradient.
        rates = upstream.masked_fill(ctx.dead, 0) * ctx.bank.lr
        rated = torch.empty(ctx.gradient.shape, dtype=upstream.dtype, device=upstream.device)
        torch.mul(ctx.gradient, rates.view(-1, 1, 1) * ctx.share, out=rated)
        return *_in_parameters(ctx, rated), None, None, None, None


def _in_parameters(ctx: Any, rated: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients in W (H, k, p) and b (H, k) that follow from one in the scores, (H, k, b)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True asks for second derivatives, and a HeadBank has none: take them of a LinearHead"
        )
    bank: HeadBank = ctx.bank
    bank._check_attached()
    (inputs,) = ctx.saved_tensors
    in_weight, in_bias, *_ = ctx.needs_input_grad
    return bank._product(rated, inputs) if in_weight else None, rated.sum(-1) if in_bias else None


def _checked_rates(lr: Sequence[float]) -> list[float]:
    rates = [float(rate) for rate in lr]
    if not rates:
        raise ValueError("lr lists no heads: give the learning rate of each")
    for index, rate in enumerate(rates):
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"a learning rate is a positive number, got lr[{index}]={rate}")
    return rates


def _one_each(penalty: Penalty | Sequence[Penalty | None] | None, heads: int) -> tuple[Penalty | None, ...]:
    return (penalty,) * heads if penalty is None or isinstance(penalty, Penalty) else tuple(penalty)


def _check_penalty(penalty: Penalty | None) -> None:
    if penalty is not None and getattr(type(penalty), "prox", None) is not Penalty.prox:
        raise TypeError(
            f"penalty of a head is None, L2, L1 or ElasticNet, got {penalty!r}: all heads take one proximal step "
            "together, so it cannot have one of its own"
        )


def _counted(feature_set: Sequence[int]) -> list[int]:
    """How many heads read each set."""
    sets = sorted(set(feature_set))
    if sets != list(range(len(sets))):
        raise ValueError(f"feature_set numbers the sets 0 … S − 1, each read by a head, got the numbers {sets}")
    return [feature_set.count(s) for s in sets]


def _name(rate: float, penalty: Penalty | None, feature_set: int, sets: int) -> str:
    parts = [f"lr={rate}"]
    if penalty is not None:
        parts.append(repr(penalty))
    if sets > 1:
        parts.append(f"set={feature_set}")
    return " ".join(parts)


def _check_unique(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        first = names.index(name)
        if first != index:
            raise ValueError(f"heads {first} and {index} are both named {name!r}: give names that tell them apart")


def _check_target(target: Tensor, samples: int) -> None:
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"target holds class indices (an integer dtype), got {target.dtype}: use target.long()")
    if target.shape != (samples,):
        raise ValueError(f"target of {samples} samples x has shape ({samples},), got {tuple(target.shape)}")
