"""Paths of λ: certified at every λ, against problems solved one by one and scikit-learn's own choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from torchlin import (
    L1,
    L2,
    ElasticNet,
    FeatureMatrix,
    NotConvergedError,
    PathResult,
    SoftmaxLoss,
    SquaredHingeLoss,
    solve,
    solve_path,
)
from torchlin.solvers.path import SharedGram, _parts, strength_max

digits = load_digits()
X = torch.tensor(digits.data[:600]) / 16
Y = torch.tensor(digits.target[:600])
XV, YV = torch.tensor(digits.data[600:900]) / 16, torch.tensor(digits.target[600:900])


@pytest.mark.parametrize("penalty", [L2, L1, partial(ElasticNet, alpha=0.4)], ids=["l2", "l1", "elastic_net"])
@pytest.mark.parametrize("loss", [SoftmaxLoss(), SquaredHingeLoss()], ids=lambda v: v.name)
def test_every_point_of_the_path_is_certified(loss: Any, penalty: Any) -> None:
    seen: list[float] = []
    path = solve_path(X, Y, loss, penalty, num=6, ratio=1e-2, tol=1e-5, report=lambda s, _: seen.append(s))
    assert seen == list(path.strengths)
    assert path.chosen is path.index is None
    assert path.strengths[-1] == pytest.approx(1e-2 * path.strengths[0])
    assert not path.val_accuracy
    assert path.passes == sum(s.passes for s in path.solutions)
    for strength, solution, nonzero in zip(path.strengths, path.solutions, path.nonzero, strict=True):
        alone = solve(X, Y, loss, penalty(strength), tol=1e-5)
        assert solution.converged
        assert solution.objective == pytest.approx(alone.objective, rel=1.1e-5)
        assert solution.certificate.dual <= alone.objective
        assert nonzero == float((solution.weight != 0).double().mean())
    z = X @ path.solutions[-1].weight.T + path.solutions[-1].bias
    assert path.train_accuracy[-1] == pytest.approx(float((z.argmax(1) == Y).double().mean()))


@pytest.mark.parametrize("standardize", [True, False])
def test_an_l1_path_starts_where_the_first_weight_appears(standardize: bool) -> None:
    x = FeatureMatrix.of(X, standardize=standardize)
    first = strength_max(x, Y, SoftmaxLoss(), L1)
    assert float(solve(x, Y, "softmax", L1(first * (1 + 1e-9)), tol=1e-10).weight.abs().max()) == 0
    assert float(solve(x, Y, "softmax", L1(first * 0.99), tol=1e-8).weight.abs().max()) > 0
    mixed = strength_max(x, Y, SoftmaxLoss(), lambda s: ElasticNet(s, 0.25))
    assert mixed == pytest.approx(4 * first)
    path = solve_path(X, Y, "softmax", L1, num=3, standardize=standardize)
    assert path.strengths[0] == pytest.approx(first)
    assert path.nonzero[0] == 0 < path.nonzero[1] < path.nonzero[2]


def test_an_l2_path_starts_where_zero_is_no_longer_certified() -> None:
    first = strength_max(FeatureMatrix.of(X), Y, SoftmaxLoss(), L2)
    (zero,) = solve(X, Y, "softmax", L2(first), max_passes=1, on_failure="return").history
    assert zero.gap == pytest.approx(1, abs=1e-2)  # D = 0, up to the bias


@pytest.mark.parametrize("sample_weight", [None, torch.linspace(0.5, 2, 600)], ids=["plain", "weighted"])
def test_choice_on_rows_that_do_not_count_until_then(sample_weight: Any) -> None:
    rows = torch.arange(0, 600, 5)
    kept = torch.ones(600, dtype=torch.float64).index_fill(0, rows, 0.0)
    weight = kept if sample_weight is None else kept * sample_weight
    x = SharedGram(FeatureMatrix.of(X, weight=sample_weight))
    path = solve_path(x, Y, "softmax", L2, num=4, validation=rows, tol=1e-7, sample_weight=sample_weight)
    assert x.computed == 1
    assert path.index is not None
    assert path.chosen is not None
    for i, (strength, solution) in enumerate(zip(path.strengths, path.solutions, strict=True)):
        alone = solve(
            FeatureMatrix.of(X, weight=sample_weight), Y, "softmax", L2(strength), sample_weight=weight, tol=1e-7
        )
        torch.testing.assert_close(solution.weight, alone.weight, atol=1e-2, rtol=1e-2)
        assert solution.objective == pytest.approx(alone.objective, rel=2e-7)
        z = X @ solution.weight.T + solution.bias
        right = (z.argmax(1) == Y).double()
        share = torch.ones(600).double() if sample_weight is None else sample_weight.double()
        assert path.val_accuracy[i] == pytest.approx(float((right * share)[rows].sum() / share[rows].sum()))
        assert path.train_accuracy[i] == pytest.approx(float((right * share * kept).sum() / (share * kept).sum()))
    everything = solve(X, Y, "softmax", L2(path.strengths[path.index]), sample_weight=sample_weight, tol=1e-7)
    assert path.chosen.objective == pytest.approx(everything.objective, rel=2e-7)
    unchosen = solve_path(x, Y, "softmax", L2, num=4, validation=rows, refit=False, sample_weight=sample_weight)
    assert unchosen.chosen is unchosen.solutions[path.index]


def test_rows_to_choose_on_leave_every_class_something() -> None:
    with pytest.raises(ValueError, match="every sample of class 3"):
        solve_path(X, Y, "softmax", L2, num=2, validation=(Y == 3).nonzero().flatten())


def test_choice_on_validation_data_and_refit() -> None:
    path = solve_path(X, Y, "softmax", L2, strengths=[1e-6, 1.0, 1e-3, 1e-2, 1e-4], validation=(XV, YV), tol=1e-6)
    assert path.strengths == (1.0, 1e-2, 1e-3, 1e-4, 1e-6)
    assert path.index is not None
    for solution, accuracy, loss in zip(path.solutions, path.val_accuracy, path.val_loss, strict=True):
        z = XV @ solution.weight.T + solution.bias
        assert accuracy == pytest.approx(float((z.argmax(1) == YV).double().mean()))
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(z, YV)))
    assert path.index == path.val_accuracy.index(max(path.val_accuracy))
    both = solve(torch.cat((X, XV)), torch.cat((Y, YV)), "softmax", L2(path.strengths[path.index]), tol=1e-6)
    assert path.chosen is not None
    assert path.chosen.objective == pytest.approx(both.objective, rel=1e-6)
    by_loss = solve_path(
        X, Y, "softmax", L2, strengths=path.strengths, validation=(XV, YV), criterion="loss", refit=False
    )
    assert by_loss.index == path.val_loss.index(min(path.val_loss))
    assert by_loss.chosen is by_loss.solutions[by_loss.index]


def test_the_validation_data_do_not_move_the_path() -> None:
    one, two = (solve_path(X, Y, "softmax", L2, num=4, validation=(v, YV)) for v in (XV, XV.flip(1)))
    for a, b in zip(one.solutions, two.solutions, strict=True):
        assert torch.equal(a.weight, b.weight)


def test_at_edge() -> None:
    path = solve_path(X, Y, "softmax", L2, strengths=[10.0, 1.0], validation=(XV, YV))
    assert path.at_edge
    assert not PathResult((1, 0.1, 0.01), (), None, 1, (), (), (), (), 0, 0).at_edge


def test_folds_are_stratified_seeded_and_complete() -> None:
    y = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)
    parts = _parts(4, y, SoftmaxLoss(), 0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(30))
    for label, count in ((0, 20), (1, 7), (2, 3)):
        held = [int((y[part] == label).sum()) for part in parts]
        assert max(held) - min(held) <= 1
        assert max(held) < count
    again, other = _parts(4, y, SoftmaxLoss(), 0), _parts(4, y, SoftmaxLoss(), 1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parts, other, strict=True))
    with pytest.raises(ValueError, match="class 1 has 1 sample: with folds, every class needs 2"):
        _parts(2, torch.tensor([0, 0, 0, 1]), SoftmaxLoss(), 0)
    with pytest.raises(ValueError, match="one of the folds holds every sample of class 0"):
        _parts([torch.tensor([0, 2]), torch.tensor([1])], torch.tensor([0, 1, 0]), SoftmaxLoss(), 0)
    with pytest.raises(ValueError, match="folds is at least 2 and at most the number of samples, 4, got 5"):
        _parts(5, torch.tensor([0, 0, 1, 1]), SoftmaxLoss(), 0)


@pytest.mark.parametrize("penalty", [L2, L1], ids=["l2", "l1"])
def test_folds_choose_as_scikit_learn_would(penalty: Any) -> None:
    strengths = [3e-2, 3e-3, 3e-4]
    path = solve_path(X, Y, "softmax", penalty, strengths=strengths, folds=3, standardize=False, tol=1e-6)
    expected = []
    for strength in strengths:
        right = 0
        for part in _parts(3, Y, SoftmaxLoss(), 0):
            kept = np.setdiff1d(np.arange(len(Y)), part.numpy())
            c = 1 / (len(kept) * strength * (2 if penalty is L2 else 1))
            solver, ratio = ("newton-cg", 0.0) if penalty is L2 else ("saga", 1.0)
            model = LogisticRegression(C=c, l1_ratio=ratio, solver=solver, tol=1e-6, max_iter=5000, random_state=0)
            model.fit(X[kept].numpy(), Y[kept].numpy())
            right += int((model.predict(X[part].numpy()) == Y[part].numpy()).sum())
        expected.append(right / len(Y))
    assert path.val_accuracy == pytest.approx(expected, abs=2.1 / len(Y))
    assert path.index == int(np.argmax(path.val_accuracy))
    assert path.chosen is path.solutions[path.index]


def test_folds_with_weights_and_given_rows() -> None:
    rows = [torch.arange(0, 600, 2), torch.arange(1, 600, 2)]
    counts = (torch.arange(600) // 2 % 3).double()
    path = solve_path(X, Y, "softmax", L2, strengths=[1e-2], folds=rows, sample_weight=counts, tol=1e-8)
    right = weight = 0.0
    for part, rest in (rows, rows[::-1]):
        s = solve(FeatureMatrix.of(X, weight=counts), Y, "softmax", L2(1e-2), tol=1e-8,
                  sample_weight=counts.index_fill(0, part, 0.0))  # fmt: skip
        hit = ((X[part] @ s.weight.T + s.bias).argmax(1) == Y[part]).double()
        right, weight = right + float((hit * counts[part]).sum()), weight + float(counts[part].sum())
        assert len(rest) == 300
    assert path.val_accuracy[0] == pytest.approx(right / weight)


def test_the_gram_matrix_is_computed_once() -> None:
    shared = SharedGram(FeatureMatrix.of(X))
    every = shared.gram()
    weight = torch.ones(600).double()
    assert shared.gram(weight) is every
    weight[torch.arange(0, 600, 5)] = 0
    expected = FeatureMatrix.of(X).gram(weight)
    exact = FeatureMatrix.of(X)
    torch.testing.assert_close(shared.gram(weight), exact.gram(weight))
    assert expected.shape == (64, 64)
    assert shared.computed == 1
    other = torch.rand(600).double()
    torch.testing.assert_close(shared.gram(other), exact.gram(other))
    torch.testing.assert_close(shared.scores(X[:3]), exact.scores(X[:3]))
    assert shared.kernel() is shared.kernel()


def test_more_features_than_samples_and_pixels() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (30, 200), dtype=torch.uint8), torch.arange(30) % 3
    path = solve_path(x, y, "softmax", L2, num=4, folds=3)
    assert all(s.converged for s in path.solutions)
    joined = solve_path(x[:24], y[:24], "softmax", L2, num=3, validation=(x[24:], y[24:])).chosen
    assert joined is not None
    assert joined.converged


def test_sparse_rows_are_joined() -> None:
    dense, y = X[:90] * (X[:90] > 0.5), Y[:90]
    one, two = (
        solve_path(f(dense[:60]), y[:60], "softmax", L2, num=3, validation=(f(dense[60:]), y[60:])).chosen
        for f in (lambda t: t, lambda t: t.to_sparse_csr())
    )
    assert one is not None
    assert two is not None
    assert one.objective == pytest.approx(two.objective, rel=2e-4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="but both are given"):
        solve_path(X, Y, validation=(XV, YV), folds=3)
    with pytest.raises(ValueError, match="criterion is 'accuracy' or 'loss', got 'auc'"):
        solve_path(X, Y, criterion="auc")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="refit=False"):
        solve_path(FeatureMatrix.of(X), Y, validation=(XV, YV))
    with pytest.raises(ValueError, match="strengths are positive numbers"):
        solve_path(X, Y, strengths=[1.0, 0.0])
    with pytest.raises(ValueError, match="ratio between 0 and 1, got num=30, ratio=2"):
        solve_path(X, Y, ratio=2)
    with pytest.raises(ValueError, match="W = 0 is the minimiser for every λ"):
        solve_path(torch.ones(10, 2), torch.arange(10) % 2)
    with pytest.raises(NotConvergedError):
        solve_path(X, Y, num=2, tol=1e-9, max_passes=3)
