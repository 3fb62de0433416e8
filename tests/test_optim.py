"""Penalties through an optimizer: the minimiser of F, exact zeros, who is touched, resuming, refusals."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from torchlin.heads import LinearHead, StandardizedHead, absorb_bias
from torchlin.losses import SoftmaxLoss
from torchlin.optim import EFFECTIVE_STEPS, apply_penalty
from torchlin.penalties import L1, L2, ElasticNet, Penalty

Make = Callable[[Iterable[Any]], optim.Optimizer]

# Adam and RMSprop move by about lr however small the gradient is, so they settle only as lr goes to 0 ("to zero").
OPTIMIZERS: dict[str, tuple[Make, bool]] = {
    "sgd": (lambda p: optim.SGD(p, lr=0.3), False),
    "sgd-momentum": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9), False),
    "sgd-nesterov": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), False),
    "sgd-dampening": (lambda p: optim.SGD(p, lr=0.3, momentum=0.5, dampening=0.5), False),
    "adam": (lambda p: optim.Adam(p, lr=0.02), True),
    "adam-amsgrad": (lambda p: optim.Adam(p, lr=0.02, amsgrad=True), True),
    "adamw": (lambda p: optim.AdamW(p, lr=0.02, weight_decay=0), True),
    "rmsprop": (lambda p: optim.RMSprop(p, lr=0.02), True),
    "rmsprop-momentum": (lambda p: optim.RMSprop(p, lr=0.02, momentum=0.5), True),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.5), False),
    "adagrad-lr_decay": (lambda p: optim.Adagrad(p, lr=0.5, lr_decay=1e-3), False),
}
EACH_OPTIMIZER = [pytest.param(make, id=name) for name, (make, _) in OPTIMIZERS.items()]
PENALTIES_TRIED = (L1(0.3), L2(0.3), ElasticNet(0.3, 0.5))
EACH_PENALTY = [pytest.param(p, id=p.name) for p in PENALTIES_TRIED]


def test_every_supported_optimizer_is_tried() -> None:
    tried = {type(make([nn.Parameter(torch.zeros(1))])) for make, _ in OPTIMIZERS.values()}
    assert tried == set(EFFECTIVE_STEPS)


def minimiser(penalty: Penalty, hessian: Tensor, centre: Tensor) -> Tensor:
    """argmin ½(w − c)ᵀH(w − c) + λR(w) by proximal gradient."""
    w, step = torch.zeros_like(centre), 1 / float(torch.linalg.eigvalsh(hessian)[-1])
    for _ in range(2000):
        w = penalty.prox(w - step * (hessian @ (w - centre)), step)
    return w


@pytest.mark.parametrize(("make", "to_zero"), [pytest.param(*v, id=k) for k, v in OPTIMIZERS.items()])
def test_every_optimizer_reaches_the_minimiser_and_its_support(make: Make, to_zero: bool) -> None:
    centre = torch.tensor([2.0, -1.5, 0, 0, 1, 0.02, -0.03, 0.5], dtype=torch.float64)
    a = torch.randn(20, 8, dtype=torch.float64)
    hessian = a.T @ a / 20 + 0.5 * torch.eye(8)
    runs: list[tuple[Penalty, dict[str, int]]] = [(p, w) for p in PENALTIES_TRIED for w in ({"window": 1}, {})]
    heads = [LinearHead(8, 1, bias=False, dtype=torch.float64) for _ in runs]
    optimizer = make([head.weight for head in heads])
    for head, (penalty, window) in zip(heads, runs, strict=True):
        apply_penalty(optimizer, head, penalty, **window)
    steps = 1200
    schedule = optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if to_zero else 1.0, steps)
    for _ in range(steps):
        gradients = (torch.cat([head.weight.detach() for head in heads]) - centre) @ hessian
        for head, gradient in zip(heads, gradients, strict=True):
            head.weight.grad = gradient.unsqueeze(0)
        optimizer.step()
        schedule.step()
    for head, (penalty, _) in zip(heads, runs, strict=True):
        found, expected = head.weight.detach()[0], minimiser(penalty, hessian, centre)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert ((found != 0) == (expected != 0)).all()
    assert (minimiser(L1(0.3), hessian, centre) == 0).sum() >= 3


@pytest.mark.parametrize("make", [pytest.param(OPTIMIZERS[n][0], id=n) for n in ("sgd-momentum", "adam", "adagrad")])
def test_zeros_survive_the_noise_of_mini_batches(make: Make) -> None:
    centre = torch.zeros(200)
    centre[:20] = 2.0
    # Of 200 weights 20 matter; the noise of one gradient is ten times λ.
    heads = [LinearHead(200, 1, bias=False) for _ in range(2)]
    optimizer = make([head.weight for head in heads])
    for group in optimizer.param_groups:
        group["lr"] /= 20
    apply_penalty(optimizer, heads[0], L1(0.1), window=1)
    apply_penalty(optimizer, heads[1], L1(0.1), window=1000)
    steps = 1500
    schedule = optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        noise = torch.randn(1, 200)
        for head in heads:
            head.weight.grad = head.weight.detach() - centre + noise
        optimizer.step()
        schedule.step()
    plain, kept = (int((head.weight[0, 20:] == 0).sum()) for head in heads)
    assert plain < 90
    assert kept > 140
    assert int((heads[1].weight[0, :20] != 0).sum()) == 20


# Who is touched.


def data(n: int = 24, p: int = 5, k: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, p), torch.arange(n) % k


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 10, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = data()
        optimizer.zero_grad()
        SoftmaxLoss()(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("penalty", EACH_PENALTY)
@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_bias_is_never_touched(make: Make, penalty: Penalty) -> None:
    head = LinearHead(5, 3, init="normal")
    nn.init.constant_(head.bias, 3.0)
    optimizer = make(head.parameters())
    apply_penalty(optimizer, head, penalty)
    for p in head.parameters():
        p.grad = torch.zeros_like(p)
    weight = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.bias, torch.full((3,), 3.0))
    assert not torch.equal(head.weight, weight)


@pytest.mark.parametrize("penalty", EACH_PENALTY)
@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_an_absorbed_bias_is_never_touched(make: Make, penalty: Penalty) -> None:
    apart = LinearHead(5, 3, init="normal")
    nn.init.constant_(apart.bias, 3.0)
    head = absorb_bias(apart)
    optimizer = make(head.parameters())
    apply_penalty(optimizer, head, penalty)
    for step in range(3):
        head.weight.grad = torch.zeros_like(head.weight)
        if step == 0:
            head.weight.grad[:, :5] = 0.1
        optimizer.step()
    assert torch.equal(head.weight[:, -1], torch.full((3,), 3.0))
    assert not torch.equal(head.weight[:, :-1], apart.weight)


@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_absorbed_and_separate_bias_train_alike(make: Make) -> None:
    x, y = data()
    apart = LinearHead(5, 3, init="normal")
    together = absorb_bias(apart)
    ones = torch.ones(len(x), 1)
    for head, features in ((apart, x), (together, torch.cat((x, ones), 1))):
        optimizer = make(head.parameters())
        apply_penalty(optimizer, head, ElasticNet(0.02, 0.5))
        for _ in range(20):
            optimizer.zero_grad()
            SoftmaxLoss()(head(features), y).backward()
            optimizer.step()
    torch.testing.assert_close(together.weight[:, :-1], apart.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.weight[:, -1], apart.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", EACH_PENALTY)
@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_other_parameters_are_bit_identical(make: Make, penalty: Penalty) -> None:
    finals = []
    for applied in (False, True):
        torch.manual_seed(3)
        head, other = LinearHead(5, 3, init="normal"), LinearHead(5, 3, init="normal")
        optimizer = make([*head.parameters(), *other.parameters()])
        if applied:
            apply_penalty(optimizer, head, penalty)
        for _ in range(8):
            x, y = data()
            optimizer.zero_grad()
            (SoftmaxLoss()(head(x), y) + SoftmaxLoss()(other(x), y)).backward()
            optimizer.step()
        finals.append((head.weight.detach().clone(), [p.detach().clone() for p in other.parameters()]))
    assert not torch.equal(finals[0][0], finals[1][0])
    assert all(torch.equal(a, b) for a, b in zip(finals[0][1], finals[1][1], strict=True))


def test_the_penalty_of_a_standardized_head_is_on_its_standardised_weight() -> None:
    head = StandardizedHead(4, 2, init="normal")
    head.std.fill_(5.0)
    optimizer = optim.SGD(head.parameters(), lr=1.0)
    apply_penalty(optimizer, head, L2(0.5))
    weight = head.weight.detach().clone()
    head.weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(head.weight.detach(), weight / 2)


@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_a_step_without_gradient_leaves_the_head_alone(make: Make) -> None:
    head, other = LinearHead(5, 3, init="normal"), nn.Parameter(torch.ones(2))
    optimizer = make([*head.parameters(), other])
    apply_penalty(optimizer, head, L1(0.1))
    weight = head.weight.detach().clone()
    other.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(head.weight, weight)
    train(head, optimizer, steps=2)
    assert bool(head.weight.isfinite().all())


def test_remove_takes_the_penalty_away() -> None:
    head = LinearHead(5, 3, init="normal")
    optimizer = optim.SGD(head.parameters(), lr=0.1)
    handle = apply_penalty(optimizer, head, L1(0.5))
    handle.remove()
    weight = head.weight.detach().clone()
    head.weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(head.weight, weight)
    apply_penalty(optimizer, head, L2(0.5))


# The rest of torch works as before.


def test_the_step_follows_the_learning_rate_of_a_schedule() -> None:
    head = LinearHead(2, 1, bias=False)
    nn.init.constant_(head.weight, 1.0)
    optimizer = optim.SGD(head.parameters(), lr=0.5)
    apply_penalty(optimizer, head, L1(0.2), window=1)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    head.weight.grad = torch.zeros_like(head.weight)
    seen = []
    for _ in range(3):
        optimizer.step()
        schedule.step()
        seen.append(head.weight[0, 0].item())
    assert seen == pytest.approx([0.9, 0.85, 0.825])


@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_a_tensor_learning_rate_is_read_as_a_number(make: Make) -> None:
    finals = []
    for tensor in (False, True):
        torch.manual_seed(3)
        head = LinearHead(5, 3, init="normal")
        optimizer = make(head.parameters())
        if tensor:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        apply_penalty(optimizer, head, L1(0.02))
        train(head, optimizer)
        finals.append(head.weight.detach().clone())
    torch.testing.assert_close(finals[0], finals[1])


@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_accumulated_gradients_equal_a_large_batch(make: Make) -> None:
    x, y = data(24)
    start = LinearHead(5, 3, init="normal")
    weights = []
    for parts in (1, 4):
        head = LinearHead(5, 3)
        head.load_state_dict(start.state_dict())
        optimizer = make(head.parameters())
        apply_penalty(optimizer, head, ElasticNet(0.05, 0.5))
        for _ in range(5):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (SoftmaxLoss()(head(a), b) / parts).backward()
            optimizer.step()
        weights.append(head.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


SCALED: dict[str, Make] = {
    "sgd": OPTIMIZERS["sgd"][0],
    "adam": OPTIMIZERS["adam"][0],
    "sgd-fused": lambda p: optim.SGD(p, lr=0.3, fused=True),
    "adam-fused": lambda p: optim.Adam(p, lr=0.02, fused=True),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0, fused=True),
    "adagrad-fused": lambda p: optim.Adagrad(p, lr=0.5, fused=True),
}


@pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in SCALED.items()])
def test_a_step_that_grad_scaler_skips_skips_the_penalty(make: Make) -> None:
    def run(overflow_at: tuple[int, ...]) -> Tensor:
        torch.manual_seed(5)
        head = LinearHead(5, 3, init="normal")
        optimizer = make(head.parameters())
        apply_penalty(optimizer, head, L1(0.01))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
        for step in range(4):
            torch.manual_seed(step)
            x, y = data()
            for bad in (True, False) if step in overflow_at else (False,):
                optimizer.zero_grad()
                scaler.scale(SoftmaxLoss()(head(x), y)).backward()
                if bad:
                    assert head.weight.grad is not None
                    head.weight.grad[0, 0] = torch.inf
                before = head.weight.detach().clone()
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(head.weight, before) is bad
        return head.weight.detach()

    undisturbed = run(())
    assert bool(undisturbed.isfinite().all())
    assert torch.equal(run((0, 2)), undisturbed)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("penalty", EACH_PENALTY)
@pytest.mark.parametrize("make", EACH_OPTIMIZER)
def test_resuming_is_bit_identical(make: Make, penalty: Penalty, when: str) -> None:
    def fresh() -> tuple[LinearHead, optim.Optimizer]:
        torch.manual_seed(3)
        head = LinearHead(5, 3, init="normal")
        return head, make(head.parameters())

    head, optimizer = fresh()
    apply_penalty(optimizer, head, penalty, window=7)
    train(head, optimizer, steps=4, seed=1)
    stream = io.BytesIO()
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    train(head, optimizer, steps=5, seed=2)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again, second = fresh()
    again.load_state_dict(saved["head"])
    if when == "before":
        apply_penalty(second, again, penalty, window=7)
    second.load_state_dict(saved["optimizer"])
    if when == "after":
        apply_penalty(second, again, penalty, window=7)
    train(again, second, steps=5, seed=2)
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)


def test_a_closure_is_passed_through() -> None:
    head = LinearHead(5, 3, init="normal")
    optimizer = optim.SGD(head.parameters(), lr=0.1)
    apply_penalty(optimizer, head, L1(0.01))
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = SoftmaxLoss()(head(x), y)
        value.backward()
        return value

    assert optimizer.step(closure).item() > 0  # type: ignore[arg-type]


# Refusals.


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "LBFGS", "SparseAdam"])
def test_other_optimizers_are_refused_by_name(name: str) -> None:
    head = LinearHead(5, 3)
    with pytest.raises(TypeError, match=rf"through {name}: .*use one of SGD, Adam, AdamW, RMSprop, Adagrad"):
        apply_penalty(getattr(optim, name)(head.parameters(), lr=0.1), head, L1(0.1))


def test_a_subclass_of_a_known_optimizer_is_taken_as_that() -> None:
    class Mine(optim.SGD):
        pass

    head = LinearHead(5, 3, init="normal")
    optimizer = Mine(head.parameters(), lr=0.1)
    apply_penalty(optimizer, head, L1(10.0), window=1)
    head.weight.grad = torch.zeros_like(head.weight)
    optimizer.step()
    assert not head.weight.any()


def test_a_weight_the_optimizer_does_not_hold() -> None:
    optimizer = optim.SGD(LinearHead(5, 3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold head\.weight"):
        apply_penalty(optimizer, LinearHead(5, 3), L1(0.1))


def test_two_penalties_on_one_weight() -> None:
    head, other = LinearHead(5, 3), LinearHead(5, 3)
    optimizer = optim.SGD([*head.parameters(), *other.parameters()], lr=0.1)
    apply_penalty(optimizer, head, L1(0.1))
    apply_penalty(optimizer, other, L1(0.1))
    with pytest.raises(ValueError, match="already has a penalty"):
        apply_penalty(optimizer, head, L2(0.1))


def test_weight_decay_in_the_group_of_the_head() -> None:
    head, other = LinearHead(5, 3), nn.Linear(5, 3)
    message = (
        r"weight_decay=0\.01 \(AdamW's default\) on head\.weight under L1\(strength=0\.1\): "
        r"give the head its own group with weight_decay=0"
    )
    with pytest.raises(ValueError, match=message):
        apply_penalty(optim.AdamW(head.parameters()), head, L1(0.1))
    groups = [{"params": head.parameters(), "weight_decay": 0}, {"params": other.parameters()}]
    apply_penalty(optim.AdamW(groups), head, L1(0.1))
    with pytest.raises(ValueError, match=r"weight_decay=0\.5 on head\.weight"):
        apply_penalty(optim.SGD(head.parameters(), lr=0.1, weight_decay=0.5), head, L2(0.1))


@pytest.mark.parametrize(("key", "value"), [("weight_decay", 0.2), ("maximize", True)])
def test_an_option_set_after_the_penalty_is_caught_at_the_step(key: str, value: Any) -> None:
    head = LinearHead(5, 3)
    optimizer = optim.SGD(head.parameters(), lr=0.1)
    apply_penalty(optimizer, head, L1(0.1))
    optimizer.param_groups[0][key] = value
    head.weight.grad = torch.zeros_like(head.weight)
    with pytest.raises(ValueError, match=key):
        optimizer.step()


def test_centered_rmsprop_and_maximize() -> None:
    head = LinearHead(5, 3)
    with pytest.raises(ValueError, match=r"RMSprop\(centered=True\)"):
        apply_penalty(optim.RMSprop(head.parameters(), centered=True), head, L1(0.1))
    with pytest.raises(ValueError, match="maximize=True"):
        apply_penalty(optim.SGD(head.parameters(), lr=0.1, maximize=True), head, L1(0.1))


def test_a_layer_that_does_not_say_what_is_penalised() -> None:
    layer = nn.Linear(5, 3)
    with pytest.raises(TypeError, match=r"got Linear: use torchlin\.LinearHead"):
        apply_penalty(optim.SGD(layer.parameters(), lr=0.1), layer, L1(0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, -1, 0.5])
def test_window_below_one(window: Any) -> None:
    head = LinearHead(5, 3)
    with pytest.raises(ValueError, match=f"window is a number of steps, at least 1, got {window}"):
        apply_penalty(optim.SGD(head.parameters(), lr=0.1), head, L1(0.1), window=window)


class Shrinking(Penalty):
    """A penalty of a user's own, with a proximal map of its own."""

    name = "shrinking"

    def __init__(self) -> None:
        super().__init__(1.0, 0.5)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w * 0


def test_a_proximal_map_of_the_users_own_is_the_one_applied() -> None:
    head = LinearHead(3, 2, init="normal")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    apply_penalty(optimizer, head, Shrinking())
    head(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert not head.weight.any()


def test_half_precision_weights_are_refused_under_l1() -> None:
    head = LinearHead(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="keep the head in float32"):
        apply_penalty(optimizer, head, L1(0.1))
    apply_penalty(optimizer, head, L2(0.1))
