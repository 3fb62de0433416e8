"""The penalties, their proximal maps, and what they are called elsewhere."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from torchlin.heads import LinearHead, absorb_bias
from torchlin.losses import SoftmaxLoss
from torchlin.objective import Objective
from torchlin.penalties import L1, L2, PENALTIES, PENALTY_REGISTRY, ElasticNet, Penalty


def examples() -> list[Any]:
    found = []
    for cls in PENALTIES:
        alphas = (0.0, 0.25, 1.0) if "alpha" in inspect.signature(cls).parameters else (None,)
        for alpha in alphas:
            penalty = cls(0.3) if alpha is None else cls(0.3, alpha)  # type: ignore[call-arg]
            found.append(pytest.param(penalty, id=str(penalty)))
    return found


def plain(penalty: Penalty, w: Tensor) -> Tensor:
    """λ(α Σ|w| + (1 − α) Σ w²)."""
    return penalty.strength * (penalty.alpha * w.abs().sum() + (1 - penalty.alpha) * (w**2).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", examples())
def test_value_and_gradient_equal_plain_autograd(penalty: Penalty, dtype: torch.dtype) -> None:
    w = torch.randn(3, 5).to(dtype).requires_grad_()
    value = penalty.value(w)
    (through_value,) = torch.autograd.grad(value, w)
    expected = plain(penalty, w.double())
    (expected_gradient,) = torch.autograd.grad(expected, w)
    rtol = 2e-3 if dtype == torch.float16 else 1e-6
    assert value.shape == ()
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(penalty.gradient(w.detach()), expected_gradient, rtol=rtol, atol=rtol)
    torch.testing.assert_close(through_value, expected_gradient, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("penalty", examples())
def test_gradient_at_zero_is_zero(penalty: Penalty) -> None:
    assert not penalty.gradient(torch.zeros(3)).any()


@pytest.mark.parametrize("step", [0.0, 0.1, 2.0, "per weight"])
@pytest.mark.parametrize("penalty", examples())
def test_prox_minimises_its_definition(penalty: Penalty, step: float | str) -> None:
    w = torch.tensor([-2.0, -0.31, -0.02, 0.0, 0.02, 0.45, 3.0], dtype=torch.float64)
    eta = torch.linspace(0, 3, 7, dtype=torch.float64) if step == "per weight" else torch.full_like(w, float(step))
    found = penalty.prox(w, eta if step == "per weight" else float(step))

    def objective(v: Tensor) -> Tensor:
        return 0.5 * (v - w) ** 2 + eta * penalty.strength * (penalty.alpha * v.abs() + (1 - penalty.alpha) * v**2)

    grid = torch.linspace(-3.5, 3.5, 70_001, dtype=torch.float64)
    best = grid[objective(grid[:, None]).argmin(0)]
    torch.testing.assert_close(found, best, rtol=0, atol=1.1e-4)
    assert bool((objective(found) <= objective(best) + 1e-12).all())


@pytest.mark.parametrize("penalty", [L1(0.5), ElasticNet(0.5, 1.0), ElasticNet(1.0, 0.5)], ids=str)
def test_prox_gives_exact_zeros_up_to_the_threshold(penalty: Penalty) -> None:
    w = torch.tensor([-0.5001, -0.5, -0.1, 0.0, 0.1, 0.5, 0.5001])
    assert (penalty.prox(w, 1.0) != 0).tolist() == [True, False, False, False, False, False, True]


def test_prox_of_l2_only_shrinks() -> None:
    assert torch.equal(L2(0.25).prox(torch.tensor([3.0, -1e-8]), 1.0), torch.tensor([3.0, -1e-8]) / 1.5)


@pytest.mark.parametrize("penalty", examples())
def test_prox_leaves_its_argument_alone(penalty: Penalty) -> None:
    w = torch.randn(4)
    kept = w.clone()
    assert penalty.prox(w, 1.0) is not w
    assert torch.equal(w, kept)


# In other libraries' words.


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_scikit_learn_objective_is_n_c_times_ours(rho: float) -> None:
    n, c = 50, 0.7
    strength, alpha = (1 + rho) / (2 * n * c), 2 * rho / (1 + rho)
    penalty = ElasticNet(strength, alpha)
    data_terms = torch.rand(n, dtype=torch.float64)
    for w in torch.randn(5, 8, dtype=torch.float64):
        theirs = c * data_terms.sum() + (1 - rho) / 2 * w.square().sum() + rho * w.abs().sum()
        torch.testing.assert_close(n * c * (data_terms.mean() + penalty.value(w)), theirs)
    assert 1 / (n * strength * (2 - alpha)) == pytest.approx(c)
    assert alpha / (2 - alpha) == pytest.approx(rho)
    if rho == 0:
        assert strength == pytest.approx(1 / (2 * n * c))
    if rho == 1:
        assert strength == pytest.approx(1 / (n * c))


def test_scikit_learn_solution_is_stationary_for_ours() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(90, 4))
    y = np.argmax(x[:, :3] + generator.normal(size=(90, 3)), 1)
    c = 0.5
    fitted = LogisticRegression(C=c, tol=1e-10, max_iter=1000).fit(x, y)
    weight = torch.tensor(fitted.coef_, requires_grad=True)
    bias = torch.tensor(fitted.intercept_, requires_grad=True)
    value = SoftmaxLoss()(torch.tensor(x) @ weight.T + bias, torch.tensor(y)) + L2(1 / (2 * 90 * c)).value(weight)
    for gradient in torch.autograd.grad(value, (weight, bias)):
        assert float(gradient.abs().max()) < 1e-6


def test_two_rows_under_l2_are_one_row_at_half_the_strength() -> None:
    n, strength = 40, 0.05
    v = torch.randn(6, dtype=torch.float64)
    two_rows = torch.stack((-v / 2, v / 2))
    c = 1 / (n * strength)
    torch.testing.assert_close(L2(strength).value(two_rows), v.square().sum() / 2 / (n * c))


def test_l2_step_is_weight_decay_of_twice_the_strength_to_first_order() -> None:
    strength, w = 0.01, torch.randn(5, dtype=torch.float64)
    errors = []
    for lr in (1e-2, 1e-3):
        p = torch.nn.Parameter(w.clone())
        p.grad = torch.zeros_like(p)
        torch.optim.SGD([p], lr=lr, weight_decay=2 * strength).step()
        assert not torch.equal(p.detach(), w)
        errors.append(float((L2(strength).prox(w, lr) - p.detach()).abs().max()))
    assert errors[1] < errors[0] / 90


# The objective.


@pytest.mark.parametrize("penalty", [None, *examples()])
def test_objective_adds_the_penalty_and_never_penalises_the_bias(penalty: Penalty | None) -> None:
    head = LinearHead(4, 3, init="normal", dtype=torch.float64)
    torch.nn.init.constant_(head.bias, 7.0)
    data_term = torch.tensor(2.0, dtype=torch.float64)
    expected = data_term if penalty is None else data_term + plain(penalty, head.weight)
    objective = Objective(SoftmaxLoss(), penalty)
    torch.testing.assert_close(objective.value(data_term, head), expected)
    torch.testing.assert_close(objective.value(data_term, absorb_bias(head)), expected)


# Errors and names.


@pytest.mark.parametrize("strength", [-1e-9, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("cls", PENALTIES, ids=lambda c: c.name)
def test_bad_strength(cls: type[L2], strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength λ of a penalty is a number ≥ 0, got {strength}"):
        cls(strength)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha is the share of the L1 part, between 0 and 1, got {alpha}"):
        ElasticNet(0.1, alpha)


@pytest.mark.parametrize("cls", PENALTIES, ids=lambda c: c.name)
def test_zero_strength_is_no_penalty(cls: type[L2]) -> None:
    w = torch.randn(4)
    assert float(cls(0).value(w)) == 0
    assert torch.equal(cls(0).prox(w, 1.0), w)


@pytest.mark.parametrize("penalty", examples())
def test_spec_repr_and_equality(penalty: Penalty) -> None:
    spec = PENALTY_REGISTRY.spec(penalty)
    again = PENALTY_REGISTRY.make(spec)
    assert again == penalty
    assert hash(again) == hash(penalty)
    assert repr(again) == repr(penalty)
    assert eval(repr(penalty), {cls.__name__: cls for cls in PENALTIES}) == penalty
    assert PENALTY_REGISTRY.make(penalty) is penalty
    assert spec["name"] == penalty.name
    assert penalty != type(penalty)(0.31)


def test_equality_tells_classes_apart() -> None:
    assert L1(0.1) != L2(0.1)
    assert L1(0.1) != "l1"
    assert repr(L1(0.001)) == "L1(strength=0.001)"


@pytest.mark.parametrize("name", [cls.name for cls in PENALTIES])
def test_a_penalty_without_strength_says_how(name: str) -> None:
    with pytest.raises(ValueError, match=rf"penalty '{name}' needs strength, as in {{name: {name}, strength: 0.001}}"):
        PENALTY_REGISTRY.make(name)


@pytest.mark.parametrize(
    ("word", "meant"), [("lasso", "l1"), ("ridge", "l2"), ("enet", "elastic_net"), ("elastic_nett", "elastic_net")]
)
def test_unknown_penalty_suggests_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown penalty '{word}' \(did you mean '{meant}'\?\)"):
        PENALTY_REGISTRY.make({"name": word, "strength": 1.0})


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'l1' has no option 'strenth' \(did you mean 'strength'\?\); options: strength"
    ):
        PENALTY_REGISTRY.make({"name": "l1", "strenth": 0.1})
