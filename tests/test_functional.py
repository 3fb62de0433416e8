"""The losses as functions."""

from __future__ import annotations

import inspect

import pytest
import torch
from plain import batch, each_loss, each_loss_and_options
from torch import Tensor

from torchlin import functional
from torchlin.losses import LOSSES, Loss


@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_function_equals_class(cls: type[Loss], options: dict[str, object]) -> None:
    f = getattr(functional, f"{cls.name}_loss")
    for reduction in ("none", "mean", "sum"):
        loss = cls(reduction=reduction, **options)  # type: ignore[arg-type]
        scores, target = batch(loss)
        z = scores.requires_grad_()
        value = f(z, target, reduction=reduction, **options)
        assert torch.equal(value, loss(z, target))
        upstream = torch.randn_like(value)
        (gradient,) = torch.autograd.grad(value, z, upstream)
        assert torch.equal(gradient, torch.autograd.grad(loss(z, target), z, upstream)[0])


@pytest.mark.parametrize("cls", each_loss())
def test_function_compiles_whole(cls: type[Loss]) -> None:
    torch._dynamo.reset()
    f = getattr(functional, f"{cls.name}_loss")
    scores, target = batch(cls())
    z = scores.requires_grad_()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])[: cls.classes(scores.shape[1])]

    def objective(z: Tensor) -> Tensor:
        value: Tensor = f(z, target, weight=weight)
        return value

    value = torch.compile(objective, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(value, objective(z))
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, torch.autograd.grad(objective(z), z)[0])


@pytest.mark.parametrize("cls", each_loss())
def test_signature_name_and_docstring_are_those_of_the_class(cls: type[Loss]) -> None:
    f = getattr(functional, f"{cls.name}_loss")
    signature = inspect.signature(f)
    assert list(signature.parameters) == ["scores", "target", *inspect.signature(cls).parameters]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(signature.parameters.values())[2:])
    assert f.__name__ == f.__qualname__ == f"{cls.name}_loss"
    assert f.__doc__ == cls.__doc__


def test_there_is_one_function_per_loss() -> None:
    assert functional.__all__ == [f"{cls.name}_loss" for cls in LOSSES]


def test_unknown_function_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no 'hing_loss' \(did you mean 'hinge_loss'\?\)"):
        functional.hing_loss  # noqa: B018


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="margn"):
        functional.hinge_loss(torch.randn(2, 3), torch.tensor([0, 1]), margn=2.0)
