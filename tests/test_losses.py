"""The losses: values and gradients against the formulas, parity with torch, kinks, extremes, errors, names."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from plain import DTYPES, REDUCTIONS, batch, classes_of, each_loss, each_loss_and_options, plain
from torch import Tensor, nn
from torch.nn import functional as F

import torchlin
from torchlin.losses import (
    LOSS_REGISTRY,
    LOSSES,
    CrammerSingerLoss,
    HingeLoss,
    LogisticLoss,
    Loss,
    PerceptronLoss,
    SoftmaxLoss,
    SquaredHingeLoss,
    reduce,
)

CLASS_TARGETS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HALF = (torch.float16, torch.bfloat16)
MARGIN_LOSSES = [pytest.param(c, id=c.name) for c in LOSSES if "margin" in inspect.signature(c).parameters]


def value_and_gradient(loss: Any, scores: Tensor, target: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    z = scores.detach().clone().requires_grad_()
    value = loss(z, target)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    assert z.grad is not None
    return [value.detach(), z.grad]


def upstream_for(reduction: str, n: int) -> Tensor:
    # Exact in bfloat16, so that every dtype sees the same upstream gradient.
    return (torch.randn(n) if reduction == "none" else torch.randn(())).mul(3).bfloat16().double()


# Values and gradients.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_value_and_gradient_follow_the_formula(
    cls: type[Loss], options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    loss = cls(reduction=reduction, **options)
    scores, target = batch(loss, dtype=dtype)
    upstream = upstream_for(reduction, len(target))
    value, gradient = value_and_gradient(loss, scores, target, upstream)
    true_value, true_gradient = value_and_gradient(lambda z, y: plain(loss, z, y), scores.double(), target, upstream)
    assert gradient.dtype == dtype
    assert value.dtype == (torch.float32 if dtype in HALF else dtype)
    exact = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(value.double(), true_value, rtol=exact, atol=exact)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, exact)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=rounding, atol=max(exact, 1e-7))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_half_types_are_never_less_exact_than_plain(
    cls: type[Loss], options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    loss = cls(reduction=reduction, **options)
    scores, target = batch(loss, n=32, dtype=dtype)
    upstream = upstream_for(reduction, len(target))
    truth = value_and_gradient(lambda z, y: plain(loss, z, y), scores.double(), target, upstream)
    ours = value_and_gradient(loss, scores, target, upstream)
    naive = value_and_gradient(lambda z, y: plain(loss, z, y), scores, target, upstream)
    for mine, theirs, true in zip(ours, naive, truth, strict=True):
        slack = 1e-6 * (1 + true.abs())
        assert bool(((mine.double() - true).abs() <= (theirs.double() - true).abs() + slack).all())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_types_are_never_less_exact_than_torch(reduction: str, dtype: torch.dtype) -> None:
    z, y = (5 * torch.randn(64, 10)).to(dtype), torch.randint(10, (64,))
    upstream = upstream_for(reduction, 64)
    pairs: list[tuple[Any, Any, Tensor, Tensor]] = [
        (SoftmaxLoss(reduction=reduction), nn.CrossEntropyLoss(reduction=reduction), z, y),
        (
            LogisticLoss(reduction=reduction),
            lambda z, y: nn.BCEWithLogitsLoss(reduction=reduction)(z, y.to(z.dtype)),
            z[:, 0],
            y % 2,
        ),
    ]
    for ours, theirs, scores, target in pairs:
        truth = value_and_gradient(theirs, scores.double(), target, upstream)
        mine = value_and_gradient(ours, scores, target, upstream)
        torchs = value_and_gradient(theirs, scores, target, upstream)
        for a, b, true in zip(mine, torchs, truth, strict=True):
            assert float((a.double() - true).abs().max()) <= float((b.double() - true).abs().max()) + 1e-6


@pytest.mark.parametrize("cls", each_loss())
def test_blocks_of_rows_change_nothing(cls: type[Loss], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = cls(reduction="none")
    scores, target = batch(loss, n=25)
    whole = value_and_gradient(loss, scores, target)
    monkeypatch.setattr("torchlin.loss._BLOCK", 8)
    for a, b in zip(value_and_gradient(loss, scores, target), whole, strict=True):
        assert torch.equal(a, b)


def test_hand_computed_samples_of_the_textbook() -> None:
    scores = torch.tensor([[5.6, 6.4, -4.6], [-1.8, 10.2, 3.5], [2.0, 5.4, -8.6]], dtype=torch.float64)
    target = torch.tensor([0, 1, 2])
    assert PerceptronLoss(reduction="none")(scores, target).tolist() == pytest.approx([0.8, 0, 24.6])
    assert HingeLoss(reduction="none")(scores, target).tolist() == pytest.approx([1.8, 0, 26.6])
    assert SoftmaxLoss().probabilities(scores)[0].tolist() == pytest.approx([0.31, 0.69, 0.0], abs=5e-3)
    assert float(HingeLoss()(scores, target)) == pytest.approx(28.4 / 3)


# Parity with torch.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (6, 5, 3), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.tensor([1.0, 0.2, 3.0, 0.0, 0.5])},
        {"ignore_index": 3},
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "weight": torch.tensor([1.0, 0.2, 3.0, 0.1, 0.5]), "ignore_index": 3},
    ],
    ids=["default", "weight", "ignore", "smoothing", "all"],
)
def test_softmax_equals_cross_entropy(options: dict[str, Any], shape: tuple[int, ...], reduction: str) -> None:
    z = torch.randn(shape)
    y = torch.randint(5, shape[:1] + shape[2:] if len(shape) > 1 else ())
    ours = SoftmaxLoss(reduction=reduction, **options)
    theirs = nn.CrossEntropyLoss(reduction=reduction, **options)
    if reduction == "mean" and len(shape) == 1 and int(y) == 3:
        y = y * 0  # a lone ignored sample is 0 here and NaN in torch
    upstream = torch.randn_like(theirs(z, y))
    for a, b in zip(value_and_gradient(ours, z, y, upstream), value_and_gradient(theirs, z, y, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3), (1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "weight": True}], ids=str)
def test_softmax_takes_class_probabilities_as_torch_does(
    options: dict[str, Any], shape: tuple[int, ...], reduction: str
) -> None:
    if "weight" in options:
        options = {**options, "weight": torch.rand(shape[min(1, len(shape) - 1)])}
    z, q = torch.randn(shape), torch.rand(shape)
    ours = SoftmaxLoss(reduction=reduction, **options)
    theirs = nn.CrossEntropyLoss(reduction=reduction, **options)
    upstream = torch.randn_like(theirs(z, q))
    for a, b in zip(value_and_gradient(ours, z, q, upstream), value_and_gradient(theirs, z, q, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column", [False, True], ids=["(n,)", "(n,1)"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_logistic_equals_bce_with_logits(reduction: str, column: bool) -> None:
    z, y = 3 * torch.randn(9), torch.arange(9) % 2
    ours = LogisticLoss(reduction=reduction, weight=[1.0, 2.5])
    theirs = nn.BCEWithLogitsLoss(reduction=reduction, pos_weight=torch.tensor(2.5))
    scores = z.unsqueeze(1) if column else z
    upstream = torch.randn_like(theirs(z, y.float()))
    value, gradient = value_and_gradient(ours, scores, y, upstream)
    true_value, true_gradient = value_and_gradient(lambda z, y: theirs(z, y.float()), z, y, upstream)
    torch.testing.assert_close(value, true_value)
    torch.testing.assert_close(gradient, true_gradient.view_as(scores))
    assert gradient.shape == scores.shape


def test_logistic_mean_without_weight_equals_bce_with_logits() -> None:
    z, y = torch.randn(9), torch.arange(9) % 2
    torch.testing.assert_close(LogisticLoss()(z, y), nn.BCEWithLogitsLoss()(z, y.float()))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.2, 3.0, 0.5])], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("margin", [1.0, 0.4])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("cls", "p"), [(HingeLoss, 1), (SquaredHingeLoss, 2)], ids=["hinge", "squared_hinge"])
def test_hinge_equals_k_times_multi_margin(
    cls: type[HingeLoss], p: int, reduction: str, margin: float, weight: Tensor | None
) -> None:
    z, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(4, (8,))
    weight = None if weight is None else weight.double()
    theirs = nn.MultiMarginLoss(p=p, margin=margin, weight=weight, reduction=reduction)
    ours = cls(margin=margin, weight=weight, reduction=reduction)
    upstream = torch.randn_like(theirs(z, y))
    k_times = value_and_gradient(lambda z, y: 4 * theirs(z, y), z, y, upstream)
    for a, b in zip(value_and_gradient(ours, z, y, upstream), k_times, strict=True):
        torch.testing.assert_close(a, b)


# Kinks and ties.


def test_perceptron_counts_ties() -> None:
    _, gradient = value_and_gradient(PerceptronLoss(reduction="sum"), torch.zeros(1, 4), torch.tensor([2]))
    assert gradient.tolist() == [[1, 1, -3, 1]]


@pytest.mark.parametrize("cls", MARGIN_LOSSES)
@pytest.mark.parametrize("margin", [1.0, 0.5])
def test_a_rival_exactly_at_the_margin_adds_nothing(cls: type[HingeLoss], margin: float) -> None:
    z = torch.tensor([[margin, 0.0, 0.0]])
    value, gradient = value_and_gradient(cls(margin=margin), z, torch.tensor([0]))
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize(("target", "expected"), [(0, [-1, 1, 0, 0]), (1, [1, -1, 0, 0]), (3, [1, 0, 0, -1])])
def test_crammer_singer_takes_the_lowest_index_on_ties(target: int, expected: list[int]) -> None:
    _, gradient = value_and_gradient(CrammerSingerLoss(), torch.zeros(1, 4), torch.tensor([target]))
    assert gradient.tolist() == [expected]


@pytest.mark.parametrize("cls", [pytest.param(c, id=c.name) for c in LOSSES if c is not LogisticLoss])
def test_a_lone_class_has_no_loss(cls: type[Loss]) -> None:
    value, gradient = value_and_gradient(cls(), torch.tensor([[3.0], [-2.0]]), torch.tensor([0, 0]))
    assert float(value) == 0
    assert not gradient.any()


# Extremes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", each_loss())
def test_scores_of_ten_thousand_are_finite_and_exact(cls: type[Loss], dtype: torch.dtype) -> None:
    loss = cls(reduction="none")
    rows = [[1e4], [-1e4], [1e4], [-1e4]] if cls is LogisticLoss else [[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]] * 2
    scores = torch.tensor(rows, dtype=torch.float64).to(dtype)
    target = torch.tensor([0, 0, 1, 1])
    value, gradient = value_and_gradient(loss, scores, target)
    z = scores.double()
    if cls is LogisticLoss:
        truth = torch.where(target == 1, -z[:, 0], z[:, 0]).relu()
    elif cls is SoftmaxLoss:
        truth = z.amax(1) - z.gather(1, target[:, None])[:, 0]
    else:
        truth = plain(loss, z, target)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [pytest.param(c, id=c.name) for c in LOSSES if c is not LogisticLoss])
def test_masked_rivals_add_nothing(cls: type[Loss], dtype: torch.dtype) -> None:
    loss = cls(reduction="none")
    seen = torch.tensor([[0.5, 1.0, -0.75], [2.0, -1.0, 0.25]], dtype=dtype)
    target = torch.tensor([0, 2])
    masked = torch.cat((seen, torch.full((2, 2), -math.inf, dtype=dtype)), 1)
    value, gradient = value_and_gradient(loss, masked, target)
    true_value, true_gradient = value_and_gradient(loss, seen, target)
    torch.testing.assert_close(value, true_value)
    torch.testing.assert_close(gradient[:, :3], true_gradient)
    assert not gradient[:, 3:].any()


@pytest.mark.parametrize("cls", [pytest.param(c, id=c.name) for c in LOSSES if c is not LogisticLoss])
def test_all_rivals_masked_is_no_loss(cls: type[Loss]) -> None:
    z = torch.full((2, 3), -math.inf)
    z[0, 0] = z[1, 2] = 1.0
    value, gradient = value_and_gradient(cls(reduction="sum"), z, torch.tensor([0, 2]))
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("exponent", [1, 100, 1000, 10_000])
def test_softmax_is_exact_down_to_vanishing_probabilities(exponent: int) -> None:
    z = torch.tensor([[0.0, float(exponent)]])
    value, gradient = value_and_gradient(SoftmaxLoss(), z, torch.tensor([0]))
    assert float(value) == pytest.approx(exponent + math.log1p(math.exp(-exponent)), rel=1e-6)
    assert gradient.tolist()[0] == pytest.approx([-1 / (1 + math.exp(-exponent)), 1 / (1 + math.exp(-exponent))])


def test_logistic_keeps_its_digits_for_confident_scores() -> None:
    z = torch.tensor([40.0, -40.0], dtype=torch.float64)
    value, gradient = value_and_gradient(LogisticLoss(reduction="none"), z, torch.tensor([1, 0]))
    torch.testing.assert_close(value, torch.full((2,), math.exp(-40), dtype=torch.float64), rtol=1e-12, atol=0)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.exp(-40)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


# Samples that do not count.


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["ignored", "weight_0"])
@pytest.mark.parametrize("cls", each_loss())
def test_a_sample_that_does_not_count_adds_exactly_nothing(
    cls: type[Loss], how: str, reduction: str, poison: float
) -> None:
    classes = classes_of(cls)
    weight = torch.ones(classes)
    weight[0] = 0
    options: dict[str, Any] = {"ignore_index": -1} if how == "ignored" else {"weight": weight}
    loss = cls(reduction=reduction, **options)
    scores = torch.randn(4, cls.outputs(classes))
    target = torch.tensor([1, -1 if how == "ignored" else 0, 1, 1])
    rest = torch.tensor([0, 2, 3])
    true_value, true_gradient = value_and_gradient(loss, scores[rest], target[rest])
    scores[1] = poison
    value, gradient = value_and_gradient(loss, scores, target)
    assert gradient[1].tolist() == [0] * cls.outputs(classes)
    torch.testing.assert_close(gradient[rest], true_gradient)
    torch.testing.assert_close(value[rest] if reduction == "none" else value, true_value)
    if reduction == "none":
        assert float(value[1]) == 0


@pytest.mark.parametrize("poison", [0.0, math.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_an_all_ignored_batch_is_zero(cls: type[Loss], options: dict[str, Any], reduction: str, poison: float) -> None:
    loss = cls(reduction=reduction, **options)
    scores = torch.full((3, cls.outputs(classes_of(cls))), poison)
    value, gradient = value_and_gradient(loss, scores, torch.full((3,), loss.ignore_index))
    assert not value.any()
    assert not gradient.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_an_empty_batch_is_zero(cls: type[Loss], options: dict[str, Any], reduction: str) -> None:
    loss = cls(reduction=reduction, **options)
    scores = torch.empty(0, cls.outputs(classes_of(cls)))
    value, gradient = value_and_gradient(loss, scores, torch.empty(0, dtype=torch.long))
    assert value.shape == ((0,) if reduction == "none" else ())
    assert not value.any()
    assert gradient.shape == scores.shape


def test_all_class_weights_of_a_batch_zero_is_zero() -> None:
    value, gradient = value_and_gradient(HingeLoss(weight=[0.0, 1.0]), torch.randn(3, 2), torch.tensor([0, 0, 0]))
    assert float(value) == 0
    assert not gradient.any()


def test_the_mean_divides_by_the_weights_that_count() -> None:
    values, normaliser = torch.tensor([2.0, 0.0, 6.0]), torch.tensor([1.0, 0.0, 3.0])
    assert float(reduce(values, normaliser)) == 2
    assert float(reduce(values)) == pytest.approx(8 / 3)
    assert float(reduce(values, normaliser, "sum")) == 8
    assert reduce(values, normaliser, "none") is values
    assert float(reduce(values[:0], normaliser[:0])) == 0


# Shapes and dtypes.


@pytest.mark.parametrize("dims", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("cls", "options"), each_loss_and_options())
def test_n_d_scores_are_so_many_rows(
    cls: type[Loss], options: dict[str, Any], reduction: str, dims: tuple[int, ...]
) -> None:
    loss = cls(reduction=reduction, **options)
    rows, target = batch(loss, n=4 * math.prod(dims))
    scores = rows.view(4, *dims, -1).movedim(-1, 1)
    value, gradient = value_and_gradient(loss, scores, target.view(4, *dims))
    true_value, true_gradient = value_and_gradient(loss, rows, target)
    torch.testing.assert_close(value, true_value.view(4, *dims) if reduction == "none" else true_value)
    torch.testing.assert_close(gradient.movedim(1, -1).reshape(rows.shape), true_gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cls", each_loss())
def test_one_sample_without_a_batch_dimension(cls: type[Loss], reduction: str) -> None:
    loss = cls(reduction=reduction)
    scores, target = batch(loss, n=1)
    value, gradient = value_and_gradient(loss, scores[0], target[0])
    true_value, true_gradient = value_and_gradient(loss, scores, target)
    assert value.shape == ()
    torch.testing.assert_close(value, true_value.view(()))
    torch.testing.assert_close(gradient, true_gradient[0])


@pytest.mark.parametrize("dtype", CLASS_TARGETS, ids=str)
@pytest.mark.parametrize("cls", each_loss())
def test_every_integer_dtype_is_a_target(cls: type[Loss], dtype: torch.dtype) -> None:
    loss = cls(ignore_index=100)
    scores, target = batch(loss)
    assert torch.equal(loss(scores, target.to(dtype)), loss(scores, target))


@pytest.mark.parametrize("cls", each_loss())
def test_non_contiguous_scores(cls: type[Loss]) -> None:
    loss = cls(reduction="none")
    scores, target = batch(loss)
    strided = scores.repeat_interleave(2, 0)[::2].t().contiguous().t()
    for a, b in zip(value_and_gradient(loss, strided, target), value_and_gradient(loss, scores, target), strict=True):
        assert torch.equal(a, b)


# Declared facts.


@pytest.mark.parametrize("cls", each_loss())
def test_fenchel_young(cls: type[Loss]) -> None:
    loss = cls()
    classes = classes_of(cls)
    z = 3 * torch.randn(400, cls.outputs(classes), dtype=torch.float64)
    y = torch.arange(400) % classes
    g = loss.gradient(z, y)
    dual = loss.dual(g, y)
    torch.testing.assert_close(loss.value(z, y), (z * g).sum(1) + dual)
    elsewhere = z + torch.randn_like(z)
    slack = loss.value(elsewhere, y) - (elsewhere * g).sum(1) - dual
    assert float(slack.min()) >= -1e-12
    mixed = (g + loss.gradient(elsewhere, y)) / 2
    slack = loss.value(z, y) - (z * mixed).sum(1) - loss.dual(mixed, y)
    assert float(slack.min()) >= -1e-12


@pytest.mark.parametrize("cls", each_loss())
def test_smoothness_bounds_the_gradient_and_is_nearly_attained(cls: type[Loss]) -> None:
    loss = cls()
    classes = classes_of(cls)
    bound = loss.smoothness(classes)
    z = torch.randn(4000, cls.outputs(classes), dtype=torch.float64)
    z[:2000] *= 0.05
    y = torch.arange(4000) % classes
    if bound is None:
        eps = 1e-9
        step = eps * torch.ones_like(z).scatter(1, y[:, None], 0) if z.shape[1] > 1 else eps * torch.ones_like(z)
        at_kink = torch.full_like(z, -eps / 2).scatter(1, y[:, None], getattr(loss, "margin", 0.0))
        jump = loss.gradient(at_kink + step, y) - loss.gradient(at_kink, y)
        assert float((jump.norm(dim=1) / step.norm(dim=1)).max()) > 1e6
        return
    step = 1e-4 * torch.randn_like(z)
    if z.shape[1] > 1:
        step[:1000] = 1e-4
        step[:1000].scatter_(1, y[:1000, None], -1e-4 * (classes - 1))
        two = torch.zeros(1000, classes, dtype=torch.float64)
        two[:, :2] = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
        z[1000:2000, 2:] -= 30
        step[1000:2000] = two
    ratio = (loss.gradient(z + step, y) - loss.gradient(z, y)).norm(dim=1) / step.norm(dim=1)
    assert float(ratio.max()) <= bound * (1 + 1e-6)
    assert float(ratio.max()) >= 0.95 * bound


@pytest.mark.parametrize("cls", each_loss())
def test_hessian_product_is_the_derivative_of_the_gradient(cls: type[Loss]) -> None:
    loss = cls()
    z, y = batch(loss)
    y = y.clamp(min=0)
    v = torch.randn_like(z)
    eps = 1e-6
    numeric = (loss.gradient(z + eps * v, y) - loss.gradient(z - eps * v, y)) / (2 * eps)
    torch.testing.assert_close(loss.hessian_product(z, y, v), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", each_loss())
def test_curvature_is_positive_and_outputs_invert_classes(cls: type[Loss]) -> None:
    classes = classes_of(cls)
    assert cls().curvature(classes) > 0
    assert cls.classes(cls.outputs(classes)) == classes


def test_which_losses_are_smooth() -> None:
    smoothness = {cls.name: cls().smoothness(classes_of(cls)) for cls in LOSSES}
    assert smoothness == {
        "perceptron": None,
        "hinge": None,
        "crammer_singer": None,
        "squared_hinge": 8.0,
        "softmax": 0.5,
        "logistic": 0.25,
    }


def test_probabilities_sum_to_one() -> None:
    z = 5 * torch.randn(6, 3)
    assert torch.equal(SoftmaxLoss().probabilities(z), torch.softmax(z, 1))
    for scores in (z[:, 0], z[:, :1]):
        p = LogisticLoss().probabilities(scores)
        assert p.shape == (6, 2)
        torch.testing.assert_close(p.sum(1), torch.ones(6))
        torch.testing.assert_close(p[:, 1], torch.sigmoid(z[:, 0]))


@pytest.mark.parametrize("cls", [PerceptronLoss, HingeLoss, CrammerSingerLoss, SquaredHingeLoss])
def test_no_probabilities_from_a_hinge(cls: type[Loss]) -> None:
    with pytest.raises(TypeError, match=f"{cls.name} loss defines no probabilities"):
        cls().probabilities(torch.randn(2, 3))


# Errors.


def scores_for(cls: type[Loss], n: int = 3) -> Tensor:
    return torch.randn(n, cls.outputs(classes_of(cls)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("cls", each_loss())
def test_target_out_of_range_is_named_with_its_position(cls: type[Loss], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"target\[1\] = 9 is not a class: .*0 … {classes_of(cls) - 1}"):
        cls()(scores_for(cls), torch.tensor([0, 9, 1], dtype=dtype))


@pytest.mark.parametrize("cls", each_loss())
def test_negative_target_is_an_error_unless_ignored(cls: type[Loss]) -> None:
    with pytest.raises(ValueError, match=r"target\[2\] = -1 .*ignore_index=-100"):
        cls()(scores_for(cls), torch.tensor([0, -100, -1]))
    cls(ignore_index=-1)(scores_for(cls), torch.tensor([0, 1, -1]))


@pytest.mark.parametrize("cls", each_loss())
def test_float_target_is_an_error(cls: type[Loss]) -> None:
    with pytest.raises(TypeError, match=r"class indices \(an integer dtype\).*torch\.float32"):
        cls()(scores_for(cls), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("cls", each_loss())
def test_integer_scores_are_an_error(cls: type[Loss]) -> None:
    with pytest.raises(TypeError, match=r"scores are floating point, got torch\.int64"):
        cls()(scores_for(cls).long(), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("cls", each_loss())
def test_shapes_that_do_not_fit_are_an_error(cls: type[Loss]) -> None:
    with pytest.raises(ValueError, match=r"\(3,.*do not fit|\(4,\).*do not fit"):
        cls()(scores_for(cls), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        cls()(scores_for(cls), torch.zeros(3, 7, dtype=torch.long))


@pytest.mark.parametrize("cls", each_loss())
def test_validate_false_skips_the_values_but_not_the_shapes(cls: type[Loss]) -> None:
    loss = cls(validate=False)
    if cls is LogisticLoss:
        assert bool(loss(scores_for(cls), torch.tensor([0, 9, 1])).isfinite())
    else:
        with pytest.raises((RuntimeError, IndexError)):
            loss(scores_for(cls), torch.tensor([0, 9, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        loss(scores_for(cls), torch.tensor([0, 1]))


@pytest.mark.parametrize("cls", each_loss())
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "average"}, ValueError, "reduction is 'none', 'mean' or 'sum', got 'average'"),
        ({"weight": [1.0, -1.0]}, ValueError, r"finite and not negative, got \[1.0, -1.0\]"),
        ({"weight": [1.0, math.nan]}, ValueError, "finite and not negative"),
        ({"weight": [1.0, math.inf]}, ValueError, "finite and not negative"),
        ({"weight": [[1.0, 2.0]]}, ValueError, r"one number per class, .* got shape \(1, 2\)"),
        ({"weight": torch.ones(2, requires_grad=True)}, ValueError, "weight requires grad"),
    ],
    ids=["reduction", "negative", "nan", "inf", "shape", "requires_grad"],
)
def test_bad_options(cls: type[Loss], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(**options)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("cls", each_loss())
def test_wrong_number_of_class_weights(cls: type[Loss], validate: bool) -> None:
    loss = cls(weight=torch.ones(7), validate=validate)
    with pytest.raises(ValueError, match=f"weight has 7 entries for {classes_of(cls)} classes"):
        loss(scores_for(cls), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("margin", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("cls", MARGIN_LOSSES)
def test_bad_margin(cls: type[HingeLoss], margin: float) -> None:
    with pytest.raises(ValueError, match=f"margin is a positive number, got {margin}"):
        cls(margin=margin)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_bad_label_smoothing(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing is between 0 and 1"):
        SoftmaxLoss(label_smoothing=smoothing)


def test_softmax_refuses_probabilities_that_require_grad_or_do_not_fit() -> None:
    z = torch.randn(3, 4)
    with pytest.raises(ValueError, match="target requires grad"):
        SoftmaxLoss()(z, torch.rand(3, 4, requires_grad=True))
    with pytest.raises(TypeError, match=r"shape of the scores \(3, 4\), got torch.float32 of shape \(3, 5\)"):
        SoftmaxLoss()(z, torch.rand(3, 5))
    with pytest.raises(ValueError, match="weight has 2 entries for 4 classes"):
        SoftmaxLoss(weight=[1.0, 2.0])(z, torch.rand(3, 4))


def test_logistic_has_one_score_and_two_classes() -> None:
    with pytest.raises(ValueError, match=r"one score per sample.*got 3"):
        LogisticLoss()(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="num_classes=3"):
        LogisticLoss.outputs(3)


# Names.


def non_default(cls: type[Loss]) -> Loss:
    special: dict[str, Any] = {
        "margin": 0.25,
        "label_smoothing": 0.2,
        "weight": [0.1, 0.7, 3.0, 1.5][: classes_of(cls)],
        "ignore_index": 7,
        "reduction": "sum",
        "validate": False,
    }
    return cls(**{name: special[name] for name in inspect.signature(cls).parameters})


@pytest.mark.parametrize("cls", each_loss())
def test_spec_and_make_round_trip(cls: type[Loss]) -> None:
    loss = non_default(cls)
    spec = LOSS_REGISTRY.spec(loss)
    again = LOSS_REGISTRY.make(spec)
    assert type(again) is cls
    assert LOSS_REGISTRY.spec(again) == spec
    assert set(spec) == {"name", *inspect.signature(cls).parameters}
    assert isinstance(loss.weight, Tensor)
    assert isinstance(again.weight, Tensor)
    assert torch.equal(again.weight, loss.weight)
    assert LOSS_REGISTRY.spec(cls()) == {"name": cls.name}
    assert LOSS_REGISTRY.make(loss) is loss
    assert type(LOSS_REGISTRY.make(cls.name)) is cls
    assert cls.name not in repr(cls()).lower() or repr(cls()).startswith(cls.__name__)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("cross_entropy", "softmax"),
        ("CE", "softmax"),
        ("svm", "hinge"),
        ("hing", "hinge"),
        ("Hinge", "hinge"),
        ("bce", "logistic"),
        ("preceptron", "perceptron"),
        ("crammer-singer", "crammer_singer"),
    ],
)
def test_unknown_name_suggests_the_nearest(word: str, meant: str) -> None:
    message = rf"unknown loss '{word}' \(did you mean '{meant}'\?\); known: perceptron, hinge"
    with pytest.raises(ValueError, match=message):
        LOSS_REGISTRY.make(word)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("zzz", ValueError, "unknown loss 'zzz'; known: "),
        ({"margin": 1.0}, ValueError, 'has no "name"; known: perceptron'),
        ({"name": "hinge", "margn": 1.0}, ValueError, r"'hinge' has no option 'margn' \(did you mean 'margin'\?\)"),
        ({"name": "perceptron", "margin": 1.0}, ValueError, "'perceptron' has no option 'margin'.*options: weight"),
        (3, TypeError, "a name, a mapping or a Loss, got int; known names: perceptron"),
        ("no.such.Loss", ValueError, "import the module 'no.such' that defines it first"),
        ("torch.nn.Linear", ValueError, "not a subclass of torchlin's Loss"),
    ],
    ids=["unknown", "nameless", "misspelt", "not_an_option", "int", "no_module", "no_loss"],
)
def test_bad_specs(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LOSS_REGISTRY.make(spec)


class Absolute(Loss):
    """|z_y − 1|: the least a user writes."""

    name = "absolute"

    def value(self, scores: Tensor, target: Tensor) -> Tensor:
        return (scores.gather(1, target.unsqueeze(1)).squeeze(1) - 1).abs()

    def gradient(self, scores: Tensor, target: Tensor) -> Tensor:
        own = target.unsqueeze(1)
        return torch.zeros_like(scores).scatter_(1, own, (scores.gather(1, own) - 1).sign())


def test_a_loss_of_ones_own_is_a_module_like_any_other() -> None:
    loss = Absolute(weight=[1.0, 2.0, 3.0])
    z, y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, -100, 1])
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)
    own = z.detach().gather(1, y.clamp(min=0)[:, None])[:, 0]
    expected = torch.tensor([1.0, 2.0, 3.0, 0.0, 2.0]).double() @ (own - 1).abs() / 8
    torch.testing.assert_close(loss(z.detach(), y), expected)
    with pytest.raises(NotImplementedError, match="absolute loss declares no dual"):
        loss.dual(z, y)
    with pytest.raises(TypeError, match="absolute loss defines no probabilities"):
        loss.probabilities(z)


def test_a_loss_of_ones_own_is_found_by_its_import_path() -> None:
    loss = Absolute(reduction="sum")
    assert LOSS_REGISTRY.make(loss) is loss
    spec = LOSS_REGISTRY.spec(loss)
    assert spec == {"name": f"{__name__}.Absolute", "reduction": "sum"}
    assert isinstance(LOSS_REGISTRY.make(spec), Absolute)
    assert "reduction=sum" in repr(loss)


@pytest.mark.parametrize("cls", each_loss())
def test_class_weights_move_with_the_module_and_stay_out_of_its_state(cls: type[Loss]) -> None:
    loss = cls(weight=[1, 2, 3, 4][: classes_of(cls)])
    assert isinstance(loss.weight, Tensor)
    assert loss.weight.dtype == torch.float32
    assert loss.state_dict() == {}
    cls().load_state_dict(loss.state_dict())
    assert loss.to(torch.float64).weight.dtype == torch.float64
    assert loss.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("cls", each_loss())
def test_class_weights_of_any_dtype_fit_any_scores(cls: type[Loss]) -> None:
    scores, target = batch(cls())
    weight = torch.tensor([1, 2, 3, 4][: classes_of(cls)])
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
        torch.testing.assert_close(cls(weight=weight.to(dtype))(scores, target), cls(weight=weight)(scores, target))


def test_public_losses_are_exactly_the_tuple() -> None:
    assert torchlin.LOSSES is LOSSES
    assert all(getattr(torchlin, cls.__name__) is cls for cls in LOSSES)
    assert len({cls.name for cls in LOSSES}) == len(LOSSES)


@pytest.mark.parametrize("cls", each_loss())
def test_docstrings_carry_formula_gradient_and_reference(cls: type[Loss]) -> None:
    text = cls.__doc__ or ""
    assert all(word in text for word in ("Value:", "Gradient:", "Reference:", "∂L/∂z"))


def test_gradient_accumulation_with_sum_equals_the_large_batch() -> None:
    z, y = torch.randn(6, 3), torch.randint(3, (6,))
    head = nn.Linear(3, 3)
    loss = SoftmaxLoss(weight=[1.0, 2.0, 3.0], reduction="sum")
    norm = torch.tensor([1.0, 2.0, 3.0])[y].sum()
    for part in (slice(0, 2), slice(2, 6)):
        (loss(head(z[part]), y[part]) / norm).backward()
    accumulated = head.weight.grad
    (whole,) = torch.autograd.grad(F.cross_entropy(head(z), y, weight=torch.tensor([1.0, 2.0, 3.0])), head.weight)
    torch.testing.assert_close(accumulated, whole)


class PassesOn(SoftmaxLoss):
    """A loss of a user's own that passes the usual options on."""

    name = "passes_on"

    def __init__(self, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature


def test_a_subclass_with_kwargs_has_the_options_of_its_base() -> None:
    loss = PassesOn(2.0, label_smoothing=0.25)
    spec = LOSS_REGISTRY.spec(loss)
    assert spec == {"name": f"{__name__}.PassesOn", "temperature": 2.0, "label_smoothing": 0.25}
    assert LOSS_REGISTRY.spec(LOSS_REGISTRY.make(spec)) == spec
    assert repr(loss) == "PassesOn(temperature=2.0, label_smoothing=0.25)"


def test_a_class_that_cannot_be_found_again_is_refused_at_once() -> None:
    class Hidden(SoftmaxLoss):
        name = "hidden"

    with pytest.raises(ValueError, match="define it at module level"):
        LOSS_REGISTRY.spec(Hidden())


def test_probabilities_of_many_positions_sum_over_the_classes() -> None:
    p = SoftmaxLoss().probabilities(torch.randn(2, 3, 5))
    torch.testing.assert_close(p.sum(1), torch.ones(2, 5))
