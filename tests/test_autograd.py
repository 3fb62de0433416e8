"""The backward contract: every way torch differentiates, over all losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain import REDUCTIONS, batch, classes_of, each_loss, each_loss_and_options, plain
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from torchlin.heads import LinearHead
from torchlin.losses import LOSSES, CrammerSingerLoss, LogisticLoss, Loss, SoftmaxLoss

ALL = each_loss_and_options()


def hessians(loss: Loss, scores: Tensor, target: Tensor) -> Tensor:
    """∂²/∂z² of the plain formula, in plain autograd."""
    found: Tensor = torch.autograd.functional.hessian(lambda z: plain(loss, z, target).sum(), scores)  # type: ignore[no-untyped-call]
    return found


# Against finite differences.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), ALL)
def test_gradcheck(cls: type[Loss], options: dict[str, Any], reduction: str) -> None:
    loss = cls(reduction=reduction, **options)
    scores, target = batch(loss, n=4)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, target),
        scores.requires_grad_(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), ALL)
def test_gradgradcheck(cls: type[Loss], options: dict[str, Any], reduction: str) -> None:
    loss = cls(reduction=reduction, **options)
    scores, target = batch(loss, n=4)
    assert torch.autograd.gradgradcheck(
        lambda z: loss(z, target), scores.requires_grad_(), check_fwd_over_rev=True, check_batched_grad=True
    )


def test_gradgradcheck_of_class_probabilities() -> None:
    scores, target = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4).double()
    loss = SoftmaxLoss(label_smoothing=0.1, weight=[1.0, 2.0, 0.5, 1.0])
    assert torch.autograd.gradcheck(lambda z: loss(z, target), scores, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, target), scores, check_fwd_over_rev=True)


# What autograd is owed.


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("cls", each_loss())
def test_frozen_scores_need_no_gradient(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    assert not loss(scores, target).requires_grad


@pytest.mark.parametrize("cls", each_loss())
def test_a_gradient_nobody_needs_is_not_computed(cls: type[Loss], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = cls()
    scores, target = batch(loss)
    calls = []
    gradient = loss.gradient
    monkeypatch.setattr(loss, "gradient", lambda *rows: calls.append(1) or gradient(*rows))
    with torch.no_grad():
        loss(scores.requires_grad_(), target)
    loss(scores, target)
    assert not calls
    loss(scores, target).backward()
    assert calls == [1]


@pytest.mark.parametrize("cls", each_loss())
def test_a_trainable_head_on_frozen_features_gets_its_gradient(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    x = torch.randn(len(target), 5, dtype=torch.float64)
    head = LinearHead(5, scores.shape[1], init="normal", dtype=torch.float64)
    loss(head(x), target).backward()
    weight, bias = torch.autograd.grad(plain(loss, head(x), target), (head.weight, head.bias))
    torch.testing.assert_close(head.weight.grad, weight)
    torch.testing.assert_close(head.bias.grad, bias)
    assert bool(weight.any())


@pytest.mark.parametrize("cls", each_loss())
def test_a_frozen_head_passes_the_gradient_on_to_its_features(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    x = torch.randn(len(target), 5, dtype=torch.float64, requires_grad=True)
    head = frozen(LinearHead(5, scores.shape[1], init="normal", dtype=torch.float64))
    loss(head(x), target).backward()
    (expected,) = torch.autograd.grad(plain(loss, head(x), target), x)
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), ALL)
def test_backward_twice_gives_the_same_and_nothing_saved_is_written_to(
    cls: type[Loss], options: dict[str, Any], dtype: torch.dtype
) -> None:
    loss = cls(reduction="none", **options)
    scores, target = batch(loss, dtype=dtype)
    upstream = torch.randn(len(target)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    kept = [t.clone() for t in (scores, target, upstream)]
    scores.requires_grad_()
    versions = [t._version for t in (scores, target, upstream)]
    value = loss(scores, target)
    first, second = (torch.autograd.grad(value, scores, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(value, scores, upstream, create_graph=True)
    assert torch.equal(first, third)
    torch.autograd.grad(third.float().square().sum(), scores, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip((scores, target, upstream), kept, strict=True))
    assert [t._version for t in (scores, target, upstream)] == versions


@pytest.mark.parametrize("cls", each_loss())
def test_gradients_accumulate(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    scores.requires_grad_()
    loss(scores, target).backward()
    assert scores.grad is not None
    once = scores.grad.clone()
    loss(scores, target).backward()
    assert torch.equal(scores.grad, 2 * once)


@pytest.mark.parametrize("cls", each_loss())
def test_one_loss_object_serves_several_graphs(cls: type[Loss]) -> None:
    loss = cls()
    a, target = batch(loss)
    b, _ = batch(loss)
    a.requires_grad_()
    b.requires_grad_()
    (loss(a, target) + 2 * loss(b, target)).backward()
    for z, factor in ((a, 1), (b, 2)):
        (alone,) = torch.autograd.grad(plain(loss, z, target), z)
        torch.testing.assert_close(z.grad, factor * alone)


@pytest.mark.parametrize("cls", each_loss())
def test_batched_upstream_gradients_give_the_jacobian(cls: type[Loss]) -> None:
    loss = cls(reduction="none")
    scores, target = batch(loss)
    scores.requires_grad_()
    value = loss(scores, target)
    eye = torch.eye(len(target), dtype=torch.float64)
    (batched,) = torch.autograd.grad(value, scores, eye, retain_graph=True, is_grads_batched=True)
    looped = torch.stack([torch.autograd.grad(value, scores, row, retain_graph=True)[0] for row in eye])
    assert torch.equal(batched, looped)


# torch.func.


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_func_grad_equals_backward(cls: type[Loss], options: dict[str, Any]) -> None:
    loss = cls(**options)
    scores, target = batch(loss)
    (expected,) = torch.autograd.grad(plain(loss, scores.requires_grad_(), target), scores)
    torch.testing.assert_close(grad(loss)(scores.detach(), target), expected)


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_per_sample_gradients_equal_a_loop(cls: type[Loss], options: dict[str, Any]) -> None:
    loss = cls(reduction="sum", **options)
    scores, target = batch(loss)
    x = torch.randn(len(target), 3, dtype=torch.float64)
    head = LinearHead(3, scores.shape[1], init="normal", dtype=torch.float64)

    def one(weight: Tensor, sample: Tensor, label: Tensor) -> Tensor:
        return loss((weight @ sample).unsqueeze(0), label.unsqueeze(0))

    batched = vmap(grad(one), (None, 0, 0))(head.weight.detach(), x, target)
    looped = [torch.autograd.grad(one(head.weight, a, b), head.weight)[0] for a, b in zip(x, target, strict=True)]
    torch.testing.assert_close(batched, torch.stack(looped))
    assert bool(batched.any())


@pytest.mark.parametrize("cls", each_loss())
def test_vmap_of_the_value_along_any_dimension(cls: type[Loss]) -> None:
    loss = cls(reduction="none", ignore_index=-1)
    scores, target = batch(loss, n=6)
    stacked = torch.stack((scores, scores + 1, scores.flip(0)), 1)
    looped = torch.stack([loss(z, target) for z in stacked.unbind(1)])
    torch.testing.assert_close(vmap(loss, (1, None))(stacked, target), looped)
    labels = torch.stack((target, target.flip(0)))
    looped = torch.stack([loss(scores, y) for y in labels])
    torch.testing.assert_close(vmap(loss, (None, 0))(scores, labels), looped)


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_hessians_equal_plain_autograd(cls: type[Loss], options: dict[str, Any]) -> None:
    loss = cls(reduction="mean", **options)
    scores, target = batch(loss, n=4)
    expected = hessians(loss, scores, target)
    for second in (jacrev(jacrev(loss)), jacfwd(jacrev(loss)), hessian(loss)):
        torch.testing.assert_close(second(scores, target), expected, rtol=1e-9, atol=1e-12)
    if loss.smoothness(classes_of(cls)) is None:
        assert not expected.any()
    else:
        assert bool(expected.any())


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_jvp_equals_finite_differences(cls: type[Loss], options: dict[str, Any]) -> None:
    loss = cls(reduction="none", **options)
    scores, target = batch(loss)
    v, eps = torch.randn_like(scores), 1e-6
    value, tangent = jvp(lambda z: loss(z, target), (scores,), (v,))
    torch.testing.assert_close(value, loss(scores, target))
    numeric = (plain(loss, scores + eps * v, target) - plain(loss, scores - eps * v, target)) / (2 * eps)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cls", each_loss())
def test_a_sample_that_does_not_count_has_no_second_derivative_either(cls: type[Loss]) -> None:
    loss = cls(reduction="sum")
    scores, target = batch(loss, n=4)
    scores[1] = torch.nan
    for second in (jacrev(jacrev(loss)), jacfwd(jacrev(loss))):
        found = second(scores, target)
        assert bool(found.isfinite().all())
        assert not found[1].any()
        assert not found[:, :, 1].any()


# Autocast.


@pytest.mark.parametrize("cls", each_loss())
def test_autocast_value_is_float32_and_the_head_gets_gradients(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss, dtype=torch.float32)
    head = LinearHead(5, scores.shape[1], init="normal")
    x = torch.randn(len(target), 5)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(x)
        value = loss(z, target)
    assert z.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(value.detach().double(), plain(loss, z.detach().double(), target), rtol=1e-6, atol=1e-6)
    assert bool(head.weight.grad.any())
    assert bool(head.weight.grad.isfinite().all())


# torch.compile.


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(f, fullgraph=True, backend=backend)


def weighted(cls: type[Loss]) -> Loss:
    """A loss with class weights, so that there are coefficients in the graph."""
    return cls(weight=[0.5, 2.0, 1.25, 0.75][: classes_of(cls)])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cls", each_loss())
def test_compiled_value_and_gradient_equal_eager(cls: type[Loss]) -> None:
    for loss in (cls(), weighted(cls)):
        scores, target = batch(loss)
        z = scores.requires_grad_()
        value = compiled(loss)(z, target)
        torch.testing.assert_close(value, loss(z, target))
        (gradient,) = torch.autograd.grad(value, z)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(z, target), z)[0])
        assert bool(gradient.any())


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cls", each_loss())
def test_compiled_vmap_and_jvp_equal_eager(cls: type[Loss]) -> None:
    loss = weighted(cls)
    scores, target = batch(loss)
    stacked = torch.stack((scores, scores + 0.1, -scores))
    for mapped in (vmap(loss, (0, None)), vmap(cls(), (0, None))):
        torch.testing.assert_close(compiled(mapped)(stacked, target), mapped(stacked, target))

    def pushed(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = jvp(lambda z: loss(z, target), (z,), (v,))
        return found

    v = torch.randn_like(scores)
    for a, b in zip(compiled(pushed)(scores, v), pushed(scores, v), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cls", each_loss())
def test_compiled_autocast_equals_eager(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss, dtype=torch.float32)
    head = LinearHead(5, scores.shape[1], init="normal")
    x = torch.randn(len(target), 5)

    def objective(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = loss(head(x), target)
        return value

    value, truth = compiled(objective)(x), objective(x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, truth)
    (weight,) = torch.autograd.grad(value, head.weight)
    torch.testing.assert_close(weight, torch.autograd.grad(truth, head.weight)[0])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cls", [LogisticLoss, CrammerSingerLoss])
def test_double_backward_under_compile_is_refused_by_torch(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    z = scores.requires_grad_()
    with pytest.raises(RuntimeError):  # noqa: PT012
        (gradient,) = torch.autograd.grad(compiled(loss)(z, target), z, create_graph=True)
        gradient.square().sum().backward()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cls", each_loss())
def test_inductor_equals_eager(cls: type[Loss]) -> None:
    loss = cls()
    scores, target = batch(loss)
    z = scores.requires_grad_()
    value = compiled(loss, "inductor")(z, target)
    torch.testing.assert_close(value, loss(z, target))
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(z, target), z)[0])


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_does_not_look_at_target_values() -> None:
    loss = SoftmaxLoss(ignore_index=0)
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    f = compiled(loss)
    torch.testing.assert_close(f(z, y), loss(z, y))
    torch.testing.assert_close(f(z, y.flip(0).contiguous()), loss(z, y.flip(0)))
    assert float(f(z, y * 0)) == 0


def test_every_loss_is_covered() -> None:
    assert {p.values[0] for p in ALL} == set(LOSSES)
