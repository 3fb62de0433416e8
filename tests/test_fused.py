"""The fused training step against the head, the loss and autograd, each on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchlin.fused import total_and_scores
from torchlin.heads import Standardization, StandardizedHead
from torchlin.losses import LOSSES, Loss, SoftmaxLoss

OPTIONS: tuple[dict[str, object], ...] = ({}, {"weight": True}, {"ignore_index": 1})


def classes_of(cls: type[Loss]) -> int:
    return 2 if cls.name == "logistic" else 4


def head_for(cls: type[Loss], dtype: torch.dtype = torch.float64) -> StandardizedHead:
    generator = torch.Generator().manual_seed(0)
    head = StandardizedHead(12, cls.outputs(classes_of(cls))).to(dtype)
    head.restandardize(Standardization(torch.rand(12, generator=generator), 0.1 + torch.rand(12, generator=generator)))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.copy_(torch.randn(head.bias.shape, generator=generator))
    return head


def batch_for(cls: type[Loss], size: int, pixels: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(0, 256, (size, 3, 2, 2), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, classes_of(cls), (size,), generator=generator)
    return (x if pixels else x.flatten(1).double() / 255), y


def with_options(cls: type[Loss], options: dict[str, object]) -> Loss:
    given = dict(options)
    if "weight" in given:
        given["weight"] = torch.arange(1.0, classes_of(cls) + 1)
    return cls(**given)  # type: ignore[arg-type]


def gradients(head: StandardizedHead, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [head.weight, head.bias]))


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("size", [0, 1, 9, 200])
def test_total_scores_and_gradients(cls: type[Loss], options: dict[str, object], pixels: bool, size: int) -> None:
    head, loss = head_for(cls), with_options(cls, options)
    x, y = batch_for(cls, size, pixels)
    total, scores = total_and_scores(head, x, y, loss)
    raw = head(x)
    expected = loss.total(raw, y)
    torch.testing.assert_close(scores, raw.detach())
    assert not scores.requires_grad
    for ours, theirs in zip(total, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), check_dtype=False)
    for ours, theirs in zip(gradients(head, -2.5 * total.loss), gradients(head, -2.5 * expected.loss), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cls", LOSSES)
def test_several_blocks_are_as_one(cls: type[Loss], half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, loss = head_for(cls, torch.float32 if half else torch.float64), cls()
    x, y = batch_for(cls, 50, pixels=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        whole, scores = total_and_scores(head, x, y, loss)
        monkeypatch.setattr("torchlin.fused._BLOCK_NUMBERS", 12 * 7)
        parts, same = total_and_scores(head, x, y, loss)
    # The sums of half-precision products are rounded block by block.
    rounding = 2e-2 if half else 1e-12
    torch.testing.assert_close(same, scores, rtol=0, atol=rounding * float(scores.abs().max()))
    for ours, theirs in zip(gradients(head, parts.loss), gradients(head, whole.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * float(theirs.abs().max()))


@pytest.mark.parametrize("cls", LOSSES)
def test_gradients_by_differences(cls: type[Loss]) -> None:
    head, loss = head_for(cls), cls()
    x, y = batch_for(cls, 7, pixels=True)

    def value(weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        total, _ = total_and_scores(head, x, y, loss)
        # The parameters stand for the arguments, whose gradient is theirs.
        in_weight, in_bias = gradients(head, total.loss)
        return (
            total.loss.detach()
            + (in_weight * (weight - weight.detach())).sum()
            + (in_bias * (bias - bias.detach())).sum()
        )

    inputs = [p.detach().clone().requires_grad_() for p in (head.weight, head.bias)]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("cls", LOSSES)
def test_backward_twice_and_all_count(cls: type[Loss]) -> None:
    head, loss = head_for(cls), cls()
    x, y = batch_for(cls, 9, pixels=True)
    total, _ = total_and_scores(head, x, y, loss, all_count=True)
    assert (total.weight, total.counting) == (9, 9)
    total.loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    total.loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


def test_what_does_not_fit_goes_the_long_way_and_says_so() -> None:
    head, loss = head_for(SoftmaxLoss), SoftmaxLoss()
    x, y = batch_for(SoftmaxLoss, 6, pixels=False)
    with pytest.raises(ValueError, match="do not fit"):
        total_and_scores(head, x, y[:5], loss)
    with pytest.raises(ValueError, match=r"target\[0\] = 9 is not a class"):
        total_and_scores(head, x, torch.full((6,), 9), loss)
    with pytest.raises(TypeError, match="class indices"):
        total_and_scores(head, x, y.double(), loss)
    soft = torch.rand(6, 4, dtype=torch.float64)
    torch.testing.assert_close(total_and_scores(head, x, soft, loss)[0].loss, loss.total(head(x), soft).loss)
    x.requires_grad_()
    total, _ = total_and_scores(head, x, y, loss)
    assert torch.autograd.grad(total.loss, x)[0].abs().sum() > 0


@pytest.mark.parametrize("cls", LOSSES)
def test_half_precision_rounds_the_weights_and_nothing_else(cls: type[Loss]) -> None:
    head = head_for(cls, torch.float32)
    x, _ = batch_for(cls, 300, pixels=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head(x)
        _, fused = total_and_scores(head, x, torch.zeros(300, dtype=torch.long), cls())
    assert half.dtype == torch.float32
    torch.testing.assert_close(fused, half, atol=0.05, rtol=0)
    exact = head(x)
    spread = exact.std()
    assert (half - exact).abs().max() < 0.05 * spread
    # Naively rounded raw features and weights are off by more.
    raw = head.fold()
    naive = torch.nn.functional.linear(raw.features(x).bfloat16(), raw.weight.bfloat16()).float() + raw.bias
    assert (half - exact).abs().mean() < (naive - exact).abs().mean()
