"""A bank of heads against each of its heads trained alone; heads that diverge; refusals; the benchmark's script."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import pickle
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import torchlin.bank
from torchlin.bank import HeadBank
from torchlin.heads import LinearHead
from torchlin.losses import LOSSES, Loss, SoftmaxLoss, SquaredHingeLoss
from torchlin.optim import apply_penalty
from torchlin.penalties import L1, L2, PENALTIES, Penalty

P, B = 6, 16
RATES = (0.02, 0.005, 0.01, 0.03)
EACH_PENALTY: tuple[Penalty | None, ...] = (None, *(cls(0.05) for cls in PENALTIES))
SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.5, "dampening": 0.5},
}
# Of feature sets: one; as many heads each, listed together, and not; a set with more heads, listed together, and not.
SETS = ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (2, 0, 1, 0))


def classes_of(cls: type[Loss]) -> int:
    return 2 if cls.name == "logistic" else 3


def batch(loss: type[Loss], sets: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x (sets, B, P) and labels that it tells something about: the last two features are noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sets, B, P, generator=generator, dtype=dtype)
    return x, (x[0, :, : classes_of(loss)] + 0.5 * x[-1, :, : classes_of(loss)]).argmax(1)


def bank_for(loss: type[Loss] = SoftmaxLoss, **options: Any) -> HeadBank:
    return HeadBank(P, loss.outputs(classes_of(loss)), **{"lr": RATES, "init": "normal", **options})


KEPT: list[optim.Optimizer] = []  # a bank whose optimizer is gone has none


def attached(bank: HeadBank, **options: Any) -> optim.SGD:
    optimizer = optim.SGD(bank.parameters(), **{"lr": 1.0, **options})
    bank.attach(optimizer, window=10)
    KEPT.append(optimizer)
    return optimizer


def train(bank: HeadBank, optimizer: optim.Optimizer, steps: int, loss: Loss | None = None, seed: int = 0) -> None:
    loss = loss or SoftmaxLoss()
    for step in range(steps):
        x, y = batch(type(loss), bank.feature_sets, seed + step)
        optimizer.zero_grad()
        bank.losses(x, y, loss).sum().backward()
        optimizer.step()


# Every head ends where it would have ended alone.


@pytest.mark.parametrize(
    ("cls", "options"),
    [pytest.param(SoftmaxLoss, options, id=f"softmax-{name}") for name, options in SGD.items()]
    + [pytest.param(cls, SGD["momentum"], id=cls.name) for cls in LOSSES if cls is not SoftmaxLoss],
)
def test_every_head_ends_where_it_ends_alone(cls: type[Loss], options: dict[str, Any]) -> None:
    bank = bank_for(cls, penalty=EACH_PENALTY, feature_set=(0, 0, 1, 1))
    heads = [bank.head(name) for name in bank.names]
    optimizer = attached(bank, **options)
    alone = [optim.SGD(head.parameters(), lr=lr, **options) for head, lr in zip(heads, RATES, strict=True)]
    for each, head, penalty in zip(alone, heads, bank.penalties, strict=True):
        if penalty is not None:
            apply_penalty(each, head, penalty, window=10)
    schedules = [optim.lr_scheduler.CosineAnnealingLR(each, 400) for each in (optimizer, *alone)]
    loss = cls()
    for step in range(200):
        x, y = batch(cls, 2, step)
        optimizer.zero_grad()
        bank.losses(x, y, loss).sum().backward()
        optimizer.step()
        for each, head, s in zip(alone, heads, bank.feature_set, strict=True):
            each.zero_grad()
            loss(head(x[s]), y).backward()
            each.step()
        for schedule in schedules:
            schedule.step()
    for index, head in enumerate(heads):
        ours, theirs = bank.weight[index].detach(), head.weight.detach()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(bank.bias[index], head.bias, rtol=1e-4, atol=1e-6)
        assert torch.equal(bank.head(index).weight, bank.weight[index])
    assert (bank.weight == 0).flatten(1).any(1).tolist() == [p is not None and p.l1 > 0 for p in bank.penalties]


@pytest.mark.parametrize("penalty", [*EACH_PENALTY[1:], None], ids=str)
def test_one_penalty_for_all_is_that_for_each(penalty: Penalty | None) -> None:
    banks = [bank_for(penalty=given, init="zeros") for given in (penalty, [penalty] * 4)]
    for bank in banks:
        train(bank, attached(bank), 5)
    assert torch.equal(banks[0].weight, banks[1].weight)


# Scores, losses and gradients.


def with_options(cls: type[Loss], option: str) -> Loss:
    given = {
        "none": {},
        "weight": {"weight": torch.arange(1.0, classes_of(cls) + 1)},
        "ignore_index": {"ignore_index": 1},
        "label_smoothing": {"label_smoothing": 0.1, "weight": torch.arange(1.0, 4.0), "ignore_index": 1},
    }[option]
    return cls(**given)  # type: ignore[arg-type]


LOSS_OPTIONS = [(cls, o) for cls in LOSSES for o in ("none", "weight", "ignore_index")]


@pytest.mark.parametrize("sets", SETS, ids=str)
@pytest.mark.parametrize(
    ("cls", "option"), [*LOSS_OPTIONS, (SoftmaxLoss, "label_smoothing")], ids=lambda v: getattr(v, "name", v)
)
def test_losses_and_gradients_are_those_of_plain_autograd(cls: type[Loss], option: str, sets: tuple[int, ...]) -> None:
    bank, loss = bank_for(cls, feature_set=sets, dtype=torch.float64), with_options(cls, option)
    attached(bank)
    x, y = batch(cls, max(sets) + 1, dtype=torch.float64)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    plain = [t.detach().clone().requires_grad_() for t in (bank.weight, bank.bias)]
    scores = [F.linear(x[s], w, b) for s, w, b in zip(sets, *plain, strict=True)]
    expected = torch.stack([loss(z, y) for z in scores])
    gradients = torch.autograd.grad(expected @ upstream, plain)

    losses = bank.losses(x, y, loss)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(bank(x), torch.stack(scores))
    rates = torch.tensor(RATES, dtype=torch.float64)
    for twice in range(2):
        got = torch.autograd.grad(losses @ upstream, list(bank.parameters()), retain_graph=twice == 0)
        torch.testing.assert_close(got[0], gradients[0] * rates.view(-1, 1, 1))
        torch.testing.assert_close(got[1], gradients[1] * rates.view(-1, 1))
    with torch.no_grad():
        torch.testing.assert_close(bank.losses(x, y, loss), expected)


@pytest.mark.parametrize("sets", SETS, ids=str)
def test_a_loss_of_the_users_own_on_the_scores(sets: tuple[int, ...]) -> None:
    bank = bank_for(feature_set=sets)
    attached(bank)
    x, y = batch(SoftmaxLoss, max(sets) + 1)
    by_hand = F.cross_entropy(bank(x).flatten(0, 1), y.repeat(4), reduction="sum") / B
    ours = torch.autograd.grad(bank.losses(x, y, SoftmaxLoss()).sum(), list(bank.parameters()))
    for got, expected in zip(torch.autograd.grad(by_hand, list(bank.parameters())), ours, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("samples", [0, 5])
def test_nothing_to_average_is_zero(cls: type[Loss], samples: int) -> None:
    bank = bank_for(cls)
    optimizer = attached(bank)
    losses = bank.losses(torch.randn(samples, P), torch.full((samples,), -100), cls())
    losses.sum().backward()
    assert losses.tolist() == [0] * 4
    assert not any(p.grad is None or p.grad.any() for p in bank.parameters())
    optimizer.step()
    assert bank.diverged == []


def test_a_loss_is_differentiable_once() -> None:
    bank = bank_for()
    attached(bank)
    x, y = batch(SoftmaxLoss)
    for value in (bank.losses(x, y, SoftmaxLoss()).sum(), bank(x).sum()):
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.grad(value, [bank.weight], create_graph=True)


def test_frozen_parameters_get_no_gradient() -> None:
    bank = bank_for()
    attached(bank)
    bank.bias.requires_grad_(False)
    x, y = batch(SoftmaxLoss)
    bank.losses(x, y, SoftmaxLoss()).sum().backward()
    assert bank.weight.grad is not None
    assert bank.bias.grad is None


def test_accumulated_gradients_equal_a_large_batch() -> None:
    banks = [bank_for(penalty=L1(0.01), init="zeros") for _ in range(2)]
    for bank, parts in zip(banks, (1, 4), strict=True):
        optimizer = attached(bank, momentum=0.9)
        for step in range(5):
            x, y = batch(SoftmaxLoss, 1, step)
            optimizer.zero_grad()
            for part in range(parts):
                rows = slice(part * B // parts, (part + 1) * B // parts)
                (bank.losses(x[:, rows], y[rows], SoftmaxLoss()) / parts).sum().backward()
            optimizer.step()
    torch.testing.assert_close(banks[0].weight, banks[1].weight)


def test_a_closure_is_passed_through() -> None:
    banks = [bank_for(penalty=L1(0.01), init="zeros") for _ in range(2)]
    train(banks[0], attached(banks[0]), 1)
    optimizer, (x, y) = attached(banks[1]), batch(SoftmaxLoss)

    def closure() -> float:
        value = banks[1].losses(x, y, SoftmaxLoss()).sum()
        value.backward()
        return value.item()

    assert optimizer.step(closure) > 0
    assert torch.equal(banks[0].weight, banks[1].weight)


# Input.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_input_is_computed_in_the_precision_of_the_weights(dtype: torch.dtype, autocast: bool) -> None:
    bank = bank_for()
    attached(bank)
    x, y = batch(SoftmaxLoss)
    expected = torch.autograd.grad(bank.losses(x.to(dtype).float(), y, SoftmaxLoss()).sum(), [bank.weight])
    with torch.autocast("cpu", enabled=autocast):
        losses = bank.losses(x.to(dtype), y, SoftmaxLoss())
        got = torch.autograd.grad(losses.sum(), [bank.weight])
        scores = bank(x.to(dtype))
    assert losses.dtype == scores.dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    assert torch.equal(scores, bank(x.to(dtype).float()))


def test_pixels_are_divided_by_255() -> None:
    bank = bank_for()
    pixels = torch.randint(0, 256, (B, P), dtype=torch.uint8)
    torch.testing.assert_close(bank(pixels), bank(pixels / 255))


def test_labels_of_any_integer_dtype() -> None:
    bank = bank_for()
    x, y = batch(SoftmaxLoss)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(bank.losses(x, y.to(dtype), SoftmaxLoss()), bank.losses(x, y, SoftmaxLoss()))


# Heads that diverge.

WILD = (0.02, 1e38, 0.01, 1e38)


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("sets", [(0, 0, 0, 0), (0, 0, 0, 1)], ids=str)
def test_the_other_heads_are_bit_for_bit_unharmed(cls: type[Loss], sets: tuple[int, ...]) -> None:
    names = ["a", "wild", "b", "wilder"]
    banks = []
    for rates in (RATES, WILD):
        torch.manual_seed(1)
        banks.append(bank_for(cls, lr=rates, names=names, penalty=EACH_PENALTY, feature_set=sets))
    tame, wild = banks
    train(tame, attached(tame, momentum=0.9), 12, cls())
    with pytest.warns(RuntimeWarning, match="heads diverged and are dropped: 'wild") as caught:
        train(wild, attached(wild, momentum=0.9), 12, cls())
    told = [word for each in caught for word in re.findall(r"'(\w+)'", str(each.message))]
    assert sorted(told) == ["wild", "wilder"]
    assert wild.diverged == ["wild", "wilder"]
    assert wild.alive.tolist() == [True, False, True, False]
    for index in (0, 2):
        assert torch.equal(tame.weight[index], wild.weight[index])
        assert torch.equal(tame.bias[index], wild.bias[index])
    x, y = batch(cls, wild.feature_sets)
    losses = wild.losses(x, y, cls())
    assert losses.isinf().tolist() == [False, True, False, True]
    # Neither the norm of all gradients nor a loss that makes 0·∞ of it carries anything to the others.
    losses.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in wild.parameters())
    assert wild.weight.grad is not None
    assert not wild.weight.grad[~wild.alive].any()
    with pytest.raises(ValueError, match=r"head 1, 'wild', diverged"):
        wild.head("wild")
    assert wild.head("b").weight.isfinite().all()


def test_a_grad_scaler_goes_on() -> None:
    bank, loss = bank_for(lr=(0.02, 1e20, 0.01, 1e21)), SquaredHingeLoss()
    optimizer, scaler = attached(bank), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = bank.weight.detach().clone()

    def some_steps() -> None:
        for step in range(12):
            x, y = batch(SquaredHingeLoss, 1, step)
            optimizer.zero_grad()
            scaler.scale(bank.losses(x, y, loss).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    with pytest.warns(RuntimeWarning, match="2 of 4 heads diverged"):
        some_steps()
    assert scaler.get_scale() == 1024.0
    assert not torch.equal(bank.weight[0], before[0])


def test_infinite_weights_are_found_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for()
    with torch.no_grad():
        bank.weight[2, 0, 0] = -torch.inf
        bank.bias[3, 0] = torch.nan
    assert bank.diverged == list(bank.names[2:])
    bank.alive.fill_(True)
    monkeypatch.setattr(torchlin.bank, "_LOOK_EVERY", 1)
    optimizer = attached(bank)
    for p in bank.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(RuntimeWarning, match=r"2 of 4 heads diverged .*'lr=0\.01', 'lr=0\.03'"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # they are named once


def test_when_all_have_diverged_it_stops() -> None:
    bank = bank_for()
    optimizer = attached(bank)
    x, y = batch(SoftmaxLoss)
    x[0, 3, 2] = torch.nan
    bank.losses(x, y, SoftmaxLoss()).sum().backward()
    with pytest.raises(FloatingPointError, match="every head has diverged"):
        optimizer.step()


def test_looking_at_a_loss_drops_nobody() -> None:
    bank = bank_for()
    x, y = batch(SoftmaxLoss)
    with torch.no_grad():
        assert not bank.losses(x * torch.inf, y, SoftmaxLoss()).isfinite().any()
    assert bool(bank.alive.all())


# Copies and resuming.


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("sets", [(0, 0, 1, 1), (1, 0, 0, 1)], ids=str)
def test_resuming_is_bit_identical(when: str, sets: tuple[int, ...]) -> None:
    def fresh() -> tuple[HeadBank, optim.SGD]:
        bank = bank_for(penalty=EACH_PENALTY, feature_set=sets)
        return bank, optim.SGD(bank.parameters(), lr=1.0, momentum=0.9)

    bank, optimizer = fresh()
    bank.attach(optimizer, window=10)
    train(bank, optimizer, 8)
    bank.alive[0] = False
    stream = io.BytesIO()
    torch.save({"bank": bank.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    bank._reported.add(bank.names[0])
    train(bank, optimizer, 8, seed=20)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again, second = fresh()
    again.load_state_dict(saved["bank"])
    if when == "before":
        again.attach(second, window=10)
    second.load_state_dict(saved["optimizer"])
    if when == "after":
        again.attach(second, window=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what had diverged before was told before
        train(again, second, 8, seed=20)
    for name, value in bank.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
    assert again.diverged == [bank.names[0]]


def test_a_state_of_other_heads_is_refused() -> None:
    state = bank_for(penalty=L1(0.1)).state_dict()
    for other, message in (
        (bank_for(penalty=L1(0.2)), r"head 0 of the state is 'lr=0\.02 L1\(strength=0\.1\)' .*, and of this bank"),
        (bank_for(lr=RATES[:3], penalty=L1(0.1)), "size mismatch"),
        (bank_for(names=["a", "b", "c", "d"], penalty=L1(0.1)), "head 0 of the state"),
        (bank_for(feature_set=(0, 0, 1, 1), names=bank_for(penalty=L1(0.1)).names, penalty=L1(0.1)), "head 2 of"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            other.load_state_dict(state)


def copy_by_pickle(bank: HeadBank) -> HeadBank:
    return pickle.loads(pickle.dumps(bank))  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_by_pickle])
def test_a_copy_trains_alike_once_it_is_attached(duplicate: Callable[[HeadBank], HeadBank]) -> None:
    bank = bank_for(penalty=EACH_PENALTY)
    optimizer = attached(bank)
    twin = duplicate(bank)
    x, y = batch(SoftmaxLoss)
    with pytest.raises(RuntimeError, match=r"call bank\.attach\(optimizer\)"):
        twin.losses(x, y, SoftmaxLoss()).sum().backward()
    train(bank, optimizer, 3)
    assert not torch.equal(bank.weight, twin.weight)
    train(twin, attached(twin), 3)
    assert torch.equal(bank.weight, twin.weight)


def test_a_head_is_a_copy() -> None:
    bank = bank_for()
    head = bank.head("lr=0.005")
    assert type(head) is LinearHead
    assert torch.equal(head.weight, bank.weight[1])
    with torch.no_grad():
        head.weight.fill_(7)
    assert not (bank.weight == 7).any()
    assert len(bank) == 4


@pytest.mark.parametrize(("which", "message"), [(4, "heads 0 … 3"), (-1, "no head -1"), ("lr=0.05", "did you mean")])
def test_no_such_head(which: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank_for().head(which)


# Nothing is forgotten.


@pytest.mark.parametrize("by_hand", [False, True])
def test_no_gradient_without_an_optimizer(by_hand: bool) -> None:
    bank = bank_for()
    x, y = batch(SoftmaxLoss)

    def loss() -> Tensor:
        return bank(x).square().sum() if by_hand else bank.losses(x, y, SoftmaxLoss()).sum()

    with pytest.raises(RuntimeError, match=r"call bank\.attach\(optimizer\) once before training"):
        loss().backward()
    optimizer = optim.SGD(bank.parameters(), lr=1.0)
    handle = bank.attach(optimizer)
    loss().backward()
    with pytest.raises(ValueError, match=r"attached to an optimizer already: remove\(\)"):
        bank.attach(optim.SGD(bank.parameters(), lr=1.0))
    handle.remove()
    with pytest.raises(RuntimeError, match="the bank has no optimizer"):
        loss().backward()
    bank.attach(optimizer)
    loss().backward()
    del optimizer
    with pytest.raises(RuntimeError, match="the bank has no optimizer"):
        loss().backward()


def test_a_penalty_for_all_heads_is_not_applied_past_their_learning_rates() -> None:
    bank = bank_for()
    with pytest.raises(TypeError, match="got HeadBank"):
        apply_penalty(optim.SGD(bank.parameters(), lr=0.1), bank, L1(0.1))  # type: ignore[arg-type]


OTHERS = ("Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "LBFGS")


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_refused_by_name(name: str) -> None:
    bank = bank_for()
    with pytest.raises(TypeError, match=rf"trained with {name}: .* use torch\.optim\.SGD"):
        bank.attach(getattr(optim, name)(bank.parameters(), lr=0.1))


def test_a_subclass_of_sgd_is_taken() -> None:
    class Mine(optim.SGD):
        pass

    bank = bank_for()
    bank.attach(Mine(bank.parameters(), lr=1.0))


def test_groups_that_would_minimise_something_else() -> None:
    bank = bank_for()
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 on bank\.weight .*penalty=L2\(0\.05\)"):
        bank.attach(optim.SGD(bank.parameters(), lr=1.0, weight_decay=0.1))
    groups = [{"params": [bank.weight]}, {"params": [bank.bias], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 on bank\.bias"):
        bank.attach(optim.SGD(groups, lr=1.0))
    with pytest.raises(ValueError, match="maximize=True"):
        bank.attach(optim.SGD(bank.parameters(), lr=1.0, maximize=True))
    with pytest.raises(ValueError, match=r"does not hold bank\.bias: build it from parameters that include the bank's"):
        bank.attach(optim.SGD([bank.weight], lr=1.0))
    with pytest.raises(ValueError, match="window is a number of steps, at least 1, got 0"):
        bank.attach(optim.SGD(bank.parameters(), lr=1.0), window=0)


@pytest.mark.parametrize(("key", "value"), [("weight_decay", 0.2), ("maximize", True)])
def test_an_option_set_later_is_caught_at_the_step(key: str, value: Any) -> None:
    bank = bank_for()
    optimizer = attached(bank)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=key):
        train(bank, optimizer, 1)


# Construction.


def test_names_say_what_tells_the_heads_apart() -> None:
    assert bank_for().names == ("lr=0.02", "lr=0.005", "lr=0.01", "lr=0.03")
    bank = bank_for(lr=[0.1] * 4, penalty=EACH_PENALTY, feature_set=(0, 1, 0, 1))
    assert bank.names[0] == "lr=0.1 set=0"
    assert bank.names[2] == "lr=0.1 L1(strength=0.05) set=0"
    assert "heads=4, feature_sets=2" in repr(bank)


class Own(L2):
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w * 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": [0.1, 0.2, 0.1, 0.3]}, ValueError, r"heads 0 and 2 are both named 'lr=0\.1'"),
        ({"names": ["a", "b", "c", "b"]}, ValueError, "heads 1 and 3 are both named 'b'"),
        ({"names": ["a"]}, ValueError, "lr lists 4 heads and names 1"),
        ({"penalty": [L1(0.1)]}, ValueError, "lr lists 4 heads and penalty 1"),
        ({"feature_set": [0, 1]}, ValueError, "lr lists 4 heads and feature_set 2"),
        ({"feature_set": [0, 2, 2, 0]}, ValueError, r"got the numbers \[0, 2\]"),
        ({"feature_set": [-1, 0, 0, 0]}, ValueError, r"got the numbers \[-1, 0\]"),
        ({"lr": []}, ValueError, "lr lists no heads"),
        ({"lr": [0.1, 0.0]}, ValueError, r"got lr\[1\]=0\.0"),
        ({"lr": [float("inf")]}, ValueError, r"got lr\[0\]=inf"),
        ({"lr": [float("nan")]}, ValueError, r"got lr\[0\]=nan"),
        ({"penalty": Own(0.1)}, TypeError, r"got Own\(strength=0\.1\)"),
        ({"penalty": ["l1"] * 4}, TypeError, "got 'l1'"),
        ({"dtype": torch.bfloat16}, ValueError, "float32 or float64, got torch.bfloat16"),
        ({"init": "ones"}, ValueError, "init is"),
    ],
)
def test_arguments_that_make_no_bank(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bank_for(**options)


def test_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="in_features is at least 1, got 0"):
        HeadBank(0, 3, lr=[0.1])
    with pytest.raises(ValueError, match="num_classes is at least 1, got 0"):
        HeadBank(3, 0, lr=[0.1])


@pytest.mark.parametrize(
    ("sets", "x", "error", "message"),
    [
        ((0, 0, 0, 0), torch.zeros(B, P + 1), ValueError, rf"x has shape \(16, 7\); this bank takes \(b, {P}\)"),
        ((0, 0, 0, 0), torch.zeros(2, B, P), ValueError, "x has shape"),
        ((0, 0, 1, 1), torch.zeros(B, P), ValueError, rf"takes \(2, b, {P}\), one \(b, {P}\) for each feature set"),
        ((0, 0, 1, 1), torch.zeros(B, 2, P), ValueError, "x has shape"),
        ((0, 0, 0, 0), torch.zeros(B, P, requires_grad=True), ValueError, r"pass x\.detach\(\)"),
        ((0, 0, 0, 0), torch.zeros(B, P, dtype=torch.int64), TypeError, "got torch.int64"),
    ],
)
def test_input_that_does_not_fit(sets: tuple[int, ...], x: Tensor, error: type[Exception], message: str) -> None:
    bank = bank_for(feature_set=sets)
    with pytest.raises(error, match=message):
        bank(x)
    with pytest.raises(error, match=message):
        bank.losses(x, torch.zeros(B, dtype=torch.int64), SoftmaxLoss())


@pytest.mark.parametrize(
    ("target", "loss", "error", "message"),
    [
        (torch.zeros(B - 1, dtype=torch.int64), SoftmaxLoss(), ValueError, r"has shape \(16,\), got \(15,\)"),
        (torch.zeros(B), SoftmaxLoss(), TypeError, r"got torch\.float32: use target\.long\(\)"),
        (torch.full((B,), 3), SoftmaxLoss(), ValueError, r"target\[0\] = 3 is not a class"),
        (torch.zeros(B, dtype=torch.int64), LOSSES[-1](), ValueError, "takes one score per sample"),
        (torch.zeros(B, dtype=torch.int64), SoftmaxLoss(weight=[1.0]), ValueError, "1 entries for 3 classes"),
        (torch.zeros(B, dtype=torch.int64), SquaredHingeLoss(reduction="sum"), ValueError, "reduction='sum'"),
    ],
)
def test_targets_and_losses_that_do_not_fit(target: Tensor, loss: Loss, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bank_for().losses(torch.zeros(B, P), target, loss)


# What is shown runs.


def test_the_example_of_the_docstring_runs() -> None:
    lines = inspect.cleandoc(HeadBank.__doc__ or "").splitlines()
    example = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")).partition("lr: ")[0])
    code = example[: example.index('set=1")') + len('set=1")')]
    data = [(torch.randn(2, 8, 384), torch.arange(8)) for _ in range(3)]
    names: dict[str, Any] = {"torch": torch, "HeadBank": HeadBank, "SoftmaxLoss": SoftmaxLoss, "batches": data}
    exec(code, names)
    assert isinstance(names["head"], nn.Linear)


SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_heads.py"


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_heads", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_heads", module)
    spec.loader.exec_module(module)
    arguments = ["--threads", "1", "--steps", "2", "--rounds", "1", "--compared-after", "5"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    module.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert [(int(row[0]), row[4].strip()) for row in rows] == [(10, "≥ 5"), (100, "≥ 1.5")]
    for row in rows:
        assert float(row[5]) <= 1e-5
        assert all(float(cell) > 0 for cell in row[1:4])
