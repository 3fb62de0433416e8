"""The certified solvers, against scikit-learn, scipy and their own certificates."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from torchlin import (
    L1,
    L2,
    CrammerSingerLoss,
    ElasticNet,
    HingeLoss,
    LogisticLoss,
    Loss,
    Penalty,
    SoftmaxLoss,
    SquaredHingeLoss,
)
from torchlin.losses import LOSS_REGISTRY
from torchlin.solvers import NotConvergedError, solve

digits = load_digits()
X = torch.tensor(digits.data) / 16
Y = torch.tensor(digits.target)


def objective(loss: Loss, penalty: Penalty | None, x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> float:
    value = loss(x @ w.T + b, y)
    return float(value if penalty is None else value + penalty.value(w))


@pytest.mark.parametrize("penalty", [L2(1e-2), L2(1e-4), L1(3e-3), ElasticNet(5e-3, 0.6)], ids=repr)
@pytest.mark.parametrize("loss", [SoftmaxLoss(), LogisticLoss()], ids=lambda v: v.name)
def test_scikit_learn_reaches_the_same_objective(loss: Loss, penalty: Penalty) -> None:
    y = (Y >= 5).long() if loss.name == "logistic" else Y
    n, alpha = len(y), penalty.alpha
    rho = alpha / (2 - alpha)
    c = 1 / (n * penalty.strength * (2 - alpha))
    solver = "lbfgs" if alpha == 0 else "saga"
    rival = LogisticRegression(C=c, l1_ratio=rho, solver=solver, tol=1e-7, max_iter=20000 if alpha == 0 else 3000)
    rival.fit(X.numpy(), y.numpy())
    w, b = (torch.tensor(np.asarray(t)) for t in (rival.coef_, rival.intercept_))
    theirs = objective(loss, penalty, X, y, w, b)
    solution = solve(X, y, loss, penalty, tol=1e-6, standardize=False)
    ours = objective(loss, penalty, X, y, solution.weight, solution.bias)
    assert solution.converged
    assert ours == pytest.approx(solution.objective, rel=1e-9)
    assert solution.certificate.dual <= theirs + 1e-9
    assert ours <= theirs * (1 + 1e-6)
    assert theirs <= ours * (1 + 2e-4)
    if alpha > 0:
        assert int((solution.weight == 0).sum()) > 0


@pytest.mark.parametrize("penalty", [L2(1e-3), L1(1e-2), ElasticNet(1e-2, 0.5)], ids=repr)
@pytest.mark.parametrize("loss", [SoftmaxLoss(), SquaredHingeLoss(), LogisticLoss()], ids=lambda v: v.name)
@pytest.mark.parametrize("standardize", [True, False])
def test_optimality_conditions(loss: Loss, penalty: Penalty, standardize: bool) -> None:
    y = Y % 2 if loss.name == "logistic" else Y
    s = solve(X, y, loss, penalty, tol=1e-8, standardize=standardize)
    mean, std = s.standardization
    x = (X - mean) / std
    w = (s.weight * std).requires_grad_()
    b = (s.bias + s.weight @ mean).requires_grad_()
    value = loss(x @ w.T + b, y)
    slope, at_bias = torch.autograd.grad(value, (w, b))
    assert float(value) + float(penalty.value(w)) == pytest.approx(s.objective, rel=1e-9)
    assert float(at_bias.abs().max()) < 1e-9
    smooth = slope + 2 * penalty.l2 * w
    off = torch.where(w == 0, (smooth.abs() - penalty.l1).clamp(min=0), (smooth + penalty.l1 * w.sign()).abs())
    assert float(off.max()) < 1e-4


HINGES = {"hinge": HingeLoss, "crammer_singer": CrammerSingerLoss}


@pytest.mark.parametrize("name", HINGES)
def test_hinge_certificate_and_a_linear_program(name: str) -> None:
    from scipy.optimize import minimize

    torch.manual_seed(0)
    x, y = torch.randn(60, 4, dtype=torch.float64), torch.arange(60) % 3
    loss, penalty = HINGES[name](), L2(0.02)
    s = solve(x, y, loss, penalty, tol=1e-5, standardize=False)
    assert s.converged
    # The same as a smooth problem with slack variables, by SLSQP.
    k, p, n = 3, 4, 60
    slack = n * k if name == "hinge" else n

    def parts(v: Any) -> tuple[Any, Any, Any]:
        return v[: k * p].reshape(k, p), v[k * p : k * p + k], v[k * p + k :]

    xs, ys = x.numpy(), y.numpy()

    def f(v: Any) -> tuple[float, Any]:
        w, _, t = parts(v)
        g = np.zeros_like(v)
        g[: k * p] = 2 * penalty.l2 * w.ravel()
        g[k * p + k :] = 1 / n
        return t.sum() / n + penalty.l2 * (w**2).sum(), g

    rows, bounds = [], []
    for i in range(n):
        for j in range(k):
            if j == ys[i]:
                continue
            row = np.zeros(k * p + k + slack)
            row[j * p : (j + 1) * p] -= xs[i]
            row[ys[i] * p : (ys[i] + 1) * p] += xs[i]
            row[k * p + j] -= 1
            row[k * p + ys[i]] += 1
            row[k * p + k + (i * k + j if name == "hinge" else i)] = 1
            rows.append(row)
    a = np.array(rows)
    bounds = [(None, None)] * (k * p + k) + [(0, None)] * slack
    start = np.zeros(k * p + k + slack)
    start[k * p + k :] = 1
    found = minimize(
        f, start, jac=True, method="SLSQP", bounds=bounds, options={"maxiter": 500, "ftol": 1e-12},
        constraints={"type": "ineq", "fun": lambda v: a @ v - 1, "jac": lambda v: a},
    )  # fmt: skip
    assert found.success
    assert s.objective == pytest.approx(found.fun, rel=3e-5)
    assert s.certificate.dual <= found.fun + 1e-7


def test_crammer_singer_is_that_of_scikit_learn() -> None:
    lam = 1e-2
    c = 1 / (2 * lam * len(Y))
    rival = LinearSVC(C=c, multi_class="crammer_singer", fit_intercept=False, tol=1e-8, max_iter=100000)
    rival.fit(X.numpy(), Y.numpy())
    theirs = objective(CrammerSingerLoss(), L2(lam), X, Y, torch.tensor(rival.coef_), torch.zeros(10))
    s = solve(X, Y, CrammerSingerLoss(), L2(lam), tol=1e-4, standardize=False, bias=False)
    assert not s.bias.any()
    assert s.certificate.dual <= theirs * (1 + 1e-9)
    assert theirs == pytest.approx(s.objective, rel=2e-4)
    # With a bias it can only be better.
    assert solve(X, Y, CrammerSingerLoss(), L2(lam), tol=1e-4, standardize=False).objective <= theirs


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_squared_hinge_without_bias_as_ten_binary_problems(penalty: str) -> None:
    c, n = 0.1, len(Y)
    for label in range(10):
        y = (label == Y).long()
        rival = LinearSVC(C=c, penalty=penalty, dual=False, fit_intercept=False, tol=1e-9, max_iter=100000)
        row = torch.tensor(rival.fit(X.numpy(), y.numpy()).coef_)
        # One row w of scores is two rows ∓w/2, with Σ|w| the same and half of Σw².
        given = L1(1 / (n * c)) if penalty == "l1" else L2(1 / (n * c))
        s = solve(X, y, "squared_hinge", given, tol=1e-6, standardize=False, bias=False)
        theirs = objective(SquaredHingeLoss(), given, X, y, torch.cat((-row, row)) / 2, torch.zeros(2))
        assert theirs == pytest.approx(s.objective, rel=2e-6)


@pytest.mark.parametrize("name", ["softmax", "hinge", "logistic"])
@pytest.mark.parametrize("p", [5, 90])
def test_without_bias(name: str, p: int) -> None:
    torch.manual_seed(8)
    k = 2 if name == "logistic" else 3
    y = torch.arange(60) % k
    x = torch.randn(60, p, dtype=torch.float64) + torch.eye(k, p).double()[y] + 0.5
    loss, tol = LOSS_REGISTRY.make(name), 1e-4 if name == "hinge" else 1e-8
    s = solve(x, y, name, L2(1e-2), tol=tol, standardize=False, bias=False)
    assert not s.bias.any()
    assert objective(loss, L2(1e-2), x, y, s.weight, s.bias) == pytest.approx(s.objective, rel=1e-9)
    assert s.objective > solve(x, y, name, L2(1e-2), tol=tol, standardize=False).objective
    if name != "hinge":
        w = s.weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x @ w.T, y) + L2(1e-2).value(w), w)
        assert float(slope.abs().max()) < 1e-5
    with pytest.raises(ValueError, match="centred by the bias, and bias=False leaves it out"):
        solve(x, y, name, L2(1e-2), bias=False)


@pytest.mark.parametrize("strength", [1e-4, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", HINGES)
def test_hinges_on_few_samples_do_not_stall(name: str, strength: float) -> None:
    """Where the biases decide, or the smoothed loss is flat, Newton's steps need a rein."""
    for seed in range(3):
        for n, p, k in ((10, 1, 3), (12, 2, 3), (30, 3, 4)):
            torch.manual_seed(seed)
            x, y = torch.randn(n, p, dtype=torch.float64), torch.arange(n) % k
            assert solve(x, y, name, L2(strength), tol=1e-4).passes < 200


@pytest.mark.parametrize("name", HINGES)
def test_hinges_on_separable_data_do_not_stall(name: str) -> None:
    torch.manual_seed(9)
    y = (torch.arange(21) >= 10).long()
    x = torch.randn(21, 36, dtype=torch.float64) + 2.0 * y.unsqueeze(1)
    assert solve(x, y, name, L2(1e-3), tol=1e-3).passes < 200


def test_the_biases_of_many_classes() -> None:
    torch.manual_seed(10)
    k, n = 100, 4000
    y = torch.multinomial(torch.linspace(1, 5, k), n, replacement=True)
    y[:k] = torch.arange(k)
    x = torch.randn(k, 8, dtype=torch.float64)[y] + torch.randn(n, 8, dtype=torch.float64)
    s = solve(x, y, "softmax", L2(1e-3), tol=1e-7)
    assert s.passes < 30
    residual = torch.softmax(x @ s.weight.T + s.bias, 1).mean(0) - torch.bincount(y) / n
    assert float(residual.abs().max()) < 1e-9


def test_l1_with_too_many_non_zeros_for_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchlin.solvers.precondition._UNKNOWNS", 10)
    polished = solve(X, Y, "softmax", L1(1e-3), tol=1e-5)
    monkeypatch.setattr("torchlin.solvers.proximal._SUPPORT", 10)
    alternated = solve(X, Y, "softmax", L1(1e-3), tol=1e-5)
    for s in (polished, alternated):
        assert s.converged
        assert 0.2 < float((s.weight == 0).double().mean()) < 0.9
    assert alternated.objective == pytest.approx(polished.objective, rel=1e-5)


def test_a_wide_problem_takes_little_memory() -> None:
    torch.manual_seed(11)
    x, y = torch.randint(0, 256, (20, 606_600), dtype=torch.uint8), torch.arange(20) % 3
    s = solve(x, y, "softmax", L2(1e-3), tol=1e-6)
    assert s.converged
    assert s.weight.shape == (3, 606_600)


@pytest.mark.parametrize("name", HINGES)
def test_projection_of_rivals(name: str) -> None:
    q = torch.randn(200, 5, dtype=torch.float64) * 2
    projected = HINGES[name]().project_rivals(q.clone())
    assert float(projected.min()) >= 0
    inside = projected <= 1 + 1e-12 if name == "hinge" else projected.sum(1, keepdim=True) <= 1 + 1e-12
    assert bool(inside.all())
    # ⟨q − P(q), v − P(q)⟩ ≤ 0 for every feasible v.
    corners = torch.cat((torch.zeros(1, 5), torch.eye(5))).double()
    products = ((q - projected).unsqueeze(1) * (corners - projected.unsqueeze(1))).sum(-1)
    assert float(products.max()) <= 1e-9


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SquaredHingeLoss()], ids=lambda v: v.name)
def test_weights_are_repetitions(loss: Loss) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(80, 5, dtype=torch.float64), torch.arange(80) % 4
    counts = torch.randint(0, 4, (80,))
    one = solve(x, y, loss, L2(1e-2), sample_weight=counts.double(), tol=1e-10)
    two = solve(x.repeat_interleave(counts, 0), y.repeat_interleave(counts), loss, L2(1e-2), tol=1e-10)
    assert one.objective == pytest.approx(two.objective, rel=1e-9)
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), HingeLoss(), SquaredHingeLoss()], ids=lambda v: v.name)
def test_more_features_than_samples(loss: Loss) -> None:
    torch.manual_seed(2)
    x, y = torch.randint(0, 256, (24, 900), dtype=torch.uint8), torch.arange(24) % 3
    s = solve(x, y, loss, L2(1e-2), tol=1e-6)
    assert s.converged
    std = s.standardization.std
    z = (x.double() / 255) @ s.weight.T + s.bias
    assert float(loss(z, y)) + 1e-2 * float((s.weight * std).square().sum()) == pytest.approx(s.objective, rel=1e-6)


def test_kinds_agree() -> None:
    x = (X * 255).round().to(torch.uint8)
    pixels, dense = (
        solve(x, Y, "softmax", L2(1e-3), tol=1e-8),
        solve(x.double() / 255, Y, "softmax", L2(1e-3), tol=1e-8),
    )
    sparse = solve((x.double() / 255).to_sparse_csr(), Y, "softmax", L2(1e-3), tol=1e-8)
    for other in (dense, sparse):
        assert pixels.objective == pytest.approx(other.objective, rel=1e-8)


@pytest.mark.parametrize(("loss", "penalty"), [("softmax", L2(1e-3)), ("softmax", L1(1e-2)), ("hinge", L2(1e-2))])
def test_one_and_two_threads_agree_in_every_bit(loss: str, penalty: Penalty) -> None:
    torch.manual_seed(4)
    # Large enough for every step to be shared between threads, and past the size of exact Newton.
    centres = torch.randint(0, 256, (12, 400))
    y = torch.arange(6000) % 12
    x = (centres[y] + 90 * torch.randn(6000, 400)).clamp(0, 255).to(torch.uint8)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(solve(x, y, loss, penalty, tol=1e-3))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    one, two = found
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)
    assert (one.objective, one.gap, one.passes) == (two.objective, two.gap, two.passes)


def test_warm_start_head_and_history() -> None:
    seen: list[Any] = []
    cold = solve(X, Y, "softmax", L2(1e-3), tol=1e-7, report=seen.append)
    assert len(seen) == len(cold.history)
    warm = solve(X, Y, "softmax", L2(1e-3), tol=1e-6, warm_start=cold)
    assert warm.passes <= 1
    head = cold.to_head()
    assert float((head.predict(X.float()) == Y).float().mean()) > 0.95
    assert float(cold.bias.sum() + (cold.weight @ cold.standardization.mean).sum()) == pytest.approx(0, abs=1e-9)


def test_not_converged_is_loud() -> None:
    with pytest.raises(NotConvergedError, match="tol is 1e-12") as caught:
        solve(X, Y, "softmax", L2(1e-4), tol=1e-12, max_passes=3)
    assert caught.value.solution.converged is False
    assert solve(X, Y, "softmax", L2(1e-4), tol=1e-12, max_passes=3, on_failure="return").gap > 1e-12


def test_no_penalty_reports_the_gradient() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(200, 3, dtype=torch.float64), torch.randint(0, 3, (200,))
    s = solve(x, y, "softmax", tol=1e-8)
    assert s.certificate.measure == "gradient"
    assert s.gap <= 1e-8
    assert math.isinf(s.certificate.dual)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), LogisticLoss()], ids=lambda v: v.name)
def test_no_minimiser_is_said(loss: Loss) -> None:
    torch.manual_seed(5)
    k = 2 if loss.name == "logistic" else 3
    y = torch.arange(90) % k
    apart = torch.randn(90, 4, dtype=torch.float64)
    apart[:, 0] += 20 * y
    apart[:, 1] += 20 * (y == 1)
    with pytest.raises(ValueError, match="classes are separable: without a penalty"):
        solve(apart, y, loss)
    # Only samples with x_0 = 1 are told apart by it, and they are of one class: quasi-separation.
    partly = torch.randn(90, 4, dtype=torch.float64)
    partly[:, 0] = ((y == 0) & (torch.arange(90) < 30)).double()
    with pytest.raises(ValueError, match="quasi-separable"):
        solve(partly, y, loss, tol=1e-4)
    assert solve(partly, y, loss, L2(1e-6)).converged
    partly[:, 0] = torch.randn(90)
    assert solve(partly, y, loss, tol=1e-2).converged


@pytest.mark.parametrize("name", HINGES)
def test_hinges_without_penalty(name: str) -> None:
    loss = HINGES[name](margin=2.0)
    s = solve(X[:500], Y[:500], loss)
    assert s.objective == 0
    assert s.gap == 0
    assert objective(loss, None, X[:500], Y[:500], s.weight, s.bias) <= 1e-6
    torch.manual_seed(6)
    with pytest.raises(ValueError, match="not separated down to"):
        solve(torch.randn(60, 2), torch.arange(60) % 3, loss)


@pytest.mark.parametrize("name", ["softmax", "squared_hinge", "hinge"])
def test_more_features_than_samples_with_weights(name: str) -> None:
    torch.manual_seed(7)
    x, y, s = torch.randn(30, 50, dtype=torch.float64), torch.arange(30) % 3, torch.randint(0, 3, (30,))
    tol = 1e-5 if name == "hinge" else 1e-8
    one = solve(x, y, name, L2(1e-2), sample_weight=s.double(), tol=tol)
    two = solve(x.repeat_interleave(s, 0), y.repeat_interleave(s), name, L2(1e-2), tol=tol)
    assert one.objective == pytest.approx(two.objective, rel=2 * tol)


@pytest.mark.parametrize(("name", "penalty"), [("softmax", L2(1e-2)), ("softmax", L1(1e-2)), ("hinge", L2(1e-2))])
def test_without_memory_for_the_gram(name: str, penalty: Penalty, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gram = solve(X, Y, name, penalty, tol=1e-3)
    monkeypatch.setattr(sys.modules["torchlin.solvers.solve"], "available_memory", lambda device: 1000)
    monkeypatch.setattr("torchlin.solvers.precondition._UNKNOWNS", 10)
    with pytest.warns(UserWarning, match="solving without it"):
        without = solve(X, Y, name, penalty, tol=1e-3, max_passes=3000)
    assert without.objective == pytest.approx(with_gram.objective, rel=2e-3)


@pytest.mark.parametrize("first", [3, 20])
@pytest.mark.parametrize("penalty", [L1(1e-2), L1(0.2), ElasticNet(1e-2, 0.7)], ids=repr)
@pytest.mark.parametrize("name", ["softmax", "squared_hinge"])
def test_a_working_set_of_features_finds_the_same(
    name: str, penalty: Penalty, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = solve(X, Y, name, penalty, tol=1e-7)
    monkeypatch.setattr(sys.modules["torchlin.solvers.solve"], "_MANY", 10)
    monkeypatch.setattr("torchlin.solvers.working._FIRST", first)
    part = solve(X, Y, name, penalty, tol=1e-7)
    assert part.gap <= 1e-7
    assert part.objective == pytest.approx(whole.objective, rel=1e-7)
    assert bool((part.weight == 0).any())


def test_more_features_than_a_gram_matrix_could_be_had_of() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6000, dtype=torch.float64)
    y = (x[:, :2] @ torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]).double()).argmax(1)
    s = solve(x, y, "softmax", L1(0.05), tol=1e-6)
    # The conditions of optimality, in plain numbers: |V| ≤ λ where a weight is 0, V = −λ sign(w) elsewhere.
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    w = s.weight * x.std(0, correction=0)
    z = x @ s.weight.T + s.bias
    v = (z.softmax(1) - torch.nn.functional.one_hot(y, 3)).T @ scaled / 40
    assert float(v.abs().max()) <= 0.05 * (1 + 1e-3)
    torch.testing.assert_close(v[w != 0], -0.05 * w[w != 0].sign(), atol=1e-4, rtol=0)
    assert 0 < int((w != 0).any(0).sum()) < 60


def test_sparse_features_whose_gram_matrix_is_too_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = torch.where(X > 0.6, X, 0.0).to_sparse_csr()
    monkeypatch.setattr("torchlin.solvers.precondition._UNKNOWNS", 10)
    with_gram = solve(sparse, Y, "softmax", L2(1e-3), tol=1e-6)
    monkeypatch.setattr(sys.modules["torchlin.solvers.solve"], "_DEAR", 0)
    monkeypatch.setattr("torchlin.features.SparseFeatures.gram", None)
    without = solve(sparse, Y, "softmax", L2(1e-3), tol=1e-6)
    assert without.objective == pytest.approx(with_gram.objective, rel=1e-6)


def test_float64_where_float32_cannot_certify() -> None:
    x = X.float()
    s = solve(x, Y, "softmax", L2(1e-5), tol=1e-9)
    exact = solve(x.double(), Y, "softmax", L2(1e-5), tol=1e-11)
    assert 0 <= s.gap <= 1e-9
    assert s.certificate.dual <= exact.objective
    with pytest.raises(NotConvergedError, match=r"products in torch.float32 allow no less: use dtype=torch.float64"):
        solve(x, Y, "softmax", L2(1e-5), tol=1e-11, dtype=torch.float32)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="perceptron loss has no full-batch solver: W = 0"):
        solve(X, Y, "perceptron", L2(1e-3))
    with pytest.raises(TypeError, match="hinge loss is solved with an L2 penalty or none"):
        solve(X, Y, "hinge", L1(1e-3))
    with pytest.raises(ValueError, match="class 3 has no sample"):
        solve(X[Y != 3], Y[Y != 3], "softmax", L2(1e-3))
    with pytest.raises(ValueError, match="all samples are of one class"):
        solve(X[Y == 0], Y[Y == 0], "softmax", L2(1e-3))
    with pytest.raises(TypeError, match="class indices"):
        solve(X, Y.double(), "softmax", L2(1e-3))
    with pytest.raises(ValueError, match="separates 2 classes"):
        solve(X, Y, "logistic", L2(1e-3))
