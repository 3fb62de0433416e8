"""The estimators, by scikit-learn's own checks and against its own solvers."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from torchlin import L1, L2, ElasticNet
from torchlin.estimators import (
    LinearSVMClassifier,
    LinearSVMClassifierCV,
    LogisticClassifier,
    LogisticClassifierCV,
    SoftmaxClassifier,
    SoftmaxClassifierCV,
)

SINGLE = (
    SoftmaxClassifier(),
    LogisticClassifier(),
    LinearSVMClassifier(loss="squared_hinge"),
    LinearSVMClassifier(loss="hinge"),
    LinearSVMClassifier(loss="crammer_singer"),
)
SEARCHED = (
    SoftmaxClassifierCV(Cs=2, cv=2),
    LogisticClassifierCV(Cs=2, cv=2),
    LinearSVMClassifierCV(Cs=(1e-3, 1e-2), cv=2, loss="squared_hinge"),
)
DX, DY = load_digits(return_X_y=True)
DX = DX / 16
IX, IY = load_iris(return_X_y=True)
BX, BY = load_breast_cancer(return_X_y=True)
BX = (BX - BX.mean(0)) / BX.std(0)


def expected_failures(estimator: Any) -> dict[str, str]:
    """Those that scikit-learn lists for its own LogisticRegression, and for piecewise linear losses only."""
    if getattr(estimator, "loss", "softmax") not in ("hinge", "crammer_singer"):
        return {}
    reason = "a gap of tol does not determine the weights of a piecewise linear loss to 7 digits"
    return {f"check_sample_weight_equivalence_on_{kind}_data": reason for kind in ("dense", "sparse")}


@pytest.mark.slow
@parametrize_with_checks([*SINGLE, *SEARCHED], expected_failed_checks=expected_failures)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(("x", "y"), [(IX, IY), (DX, DY), (BX, BY)], ids=["iris", "digits", "cancer"])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_l2_equals_newton_cg(x: Any, y: Any, c: float) -> None:
    rival = LogisticRegression(C=c, solver="newton-cg", tol=1e-12, max_iter=1000).fit(x, y)
    model = SoftmaxClassifier(C=c).fit(x, y)
    assert model.coef_.shape == rival.coef_.shape
    np.testing.assert_allclose(model.coef_, rival.coef_, atol=2e-6)
    np.testing.assert_allclose(np.diff(model.intercept_), np.diff(rival.intercept_), atol=2e-5)
    np.testing.assert_allclose(model.predict_proba(x), rival.predict_proba(x), atol=1e-6)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))
    assert model.dual_gap_ < 1e-8
    if len(model.classes_) == 2:
        assert model.decision_function(x).shape == (len(y),)
        other = LogisticClassifier(C=c).fit(x, y)
        assert np.array_equal(other.coef_, model.coef_)


def sklearn_objective(model: Any, x: Any, y: Any, c: float, ratio: float) -> float:
    """scikit-learn's own, whose intercept is free."""
    log = model.predict_log_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    w = model.coef_
    return float(-c * log.sum() + ratio * np.abs(w).sum() + 0.5 * (1 - ratio) * (w**2).sum())


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize(("x", "y"), [(IX, IY), (DX[:500], DY[:500]), (BX, BY)], ids=["iris", "digits", "cancer"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_l1_and_elastic_net_are_no_worse_than_saga(x: Any, y: Any, ratio: float) -> None:
    c = 0.1
    rival = LogisticRegression(C=c, l1_ratio=ratio, solver="saga", tol=1e-6, max_iter=2000).fit(x, y)
    model = SoftmaxClassifier(C=c, l1_ratio=ratio).fit(x, y)
    ours, theirs = (sklearn_objective(m, x, y, c, ratio) for m in (model, rival))
    assert ours <= theirs * (1 + 1e-9)
    assert theirs <= ours * (1 + 1e-4)
    assert model.dual_gap_ < 1e-6
    assert (model.coef_ == 0).any()


@pytest.mark.parametrize("weighted", ["class", "sample", "balanced"])
def test_weights_as_in_scikit_learn(weighted: str) -> None:
    s = np.random.default_rng(0).uniform(0.1, 3, len(IY)) if weighted != "class" else None
    weight = {0: 3.0, 1: 0.5, 2: 1.0} if weighted == "class" else "balanced" if weighted == "balanced" else None
    rival = LogisticRegression(C=0.3, class_weight=weight, solver="newton-cg", tol=1e-12).fit(IX, IY, s)
    model = SoftmaxClassifier(C=0.3, class_weight=weight).fit(IX, IY, s)
    np.testing.assert_allclose(model.coef_, rival.coef_, atol=2e-6)


def svm_objective(w: Any, b: Any, x: Any, y: Any, c: float, power: int) -> float:
    sign = np.where(y == 1, 1, -1)
    slack = np.maximum(0, 1 - sign * (x @ w.ravel() + b))
    return float(0.5 * (w**2).sum() + c * (slack**power).sum())


@pytest.mark.parametrize("loss", ["hinge", "crammer_singer", "squared_hinge"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning:sklearn")
def test_two_class_svm_is_one_row(loss: Any) -> None:
    c, power = 0.01, 2 if loss == "squared_hinge" else 1
    model = LinearSVMClassifier(C=c, loss=loss, tol=1e-4).fit(BX, BY)
    assert model.coef_.shape == (1, BX.shape[1])
    assert model.intercept_.shape == (1,)
    assert not hasattr(model, "predict_proba")
    ours = svm_objective(model.coef_, model.intercept_, BX, BY, c, power)
    # LinearSVC penalises its intercept, here hardly.
    rival = LinearSVC(C=c, loss="squared_hinge" if power == 2 else "hinge", intercept_scaling=1e3, tol=1e-8,
                      max_iter=200000, random_state=0)  # fmt: skip
    rival.fit(BX, BY)
    assert ours <= svm_objective(rival.coef_, rival.intercept_, BX, BY, c, power) * (1 + 1e-4)
    centred = LinearSVC(C=c, loss="squared_hinge" if power == 2 else "hinge", tol=1e-8, max_iter=200000).fit(BX, BY)
    assert ours <= svm_objective(centred.coef_, centred.intercept_, BX, BY, c, power) * (1 + 1e-4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning:sklearn")
def test_l1_squared_hinge_of_two_classes() -> None:
    model = LinearSVMClassifier(C=0.1, loss="squared_hinge", l1_ratio=1.0).fit(BX, BY)
    rival = LinearSVC(C=0.1, penalty="l1", dual=False, tol=1e-10, max_iter=10000, intercept_scaling=1e3).fit(BX, BY)

    def f(m: Any) -> float:
        slack = np.maximum(0, 1 - np.where(BY == 1, 1, -1) * m.decision_function(BX))
        return float(np.abs(m.coef_).sum() + 0.1 * (slack**2).sum())

    assert f(model) <= f(rival) + 1e-6
    assert (model.coef_ == 0).sum() > 5


def test_a_torchlin_penalty_replaces_c_and_l1_ratio() -> None:
    n = len(IY)
    one = SoftmaxClassifier(C=2.0, l1_ratio=0.5).fit(IX, IY)
    two = SoftmaxClassifier(C=17, penalty=ElasticNet(1.5 / (2 * n * 2), 2 / 3)).fit(IX, IY)
    np.testing.assert_allclose(one.coef_, two.coef_, atol=1e-8)
    scaled = SoftmaxClassifier(penalty=L2(1e-3), standardize=True).fit(IX, IY)
    by_hand = SoftmaxClassifier(penalty=L2(1e-3)).fit((IX - IX.mean(0)) / IX.std(0), IY)
    np.testing.assert_allclose(scaled.coef_ * IX.std(0), by_hand.coef_, atol=1e-8)


def test_every_kind_of_input() -> None:
    labels = np.array(["setosa", "versicolor", "virginica"])[IY]
    expected = SoftmaxClassifier().fit(IX, labels)
    frame = pd.DataFrame(IX, columns=list("abcd"))
    for x, y in (
        (frame, pd.Series(labels)),
        (csr_matrix(IX), labels),
        (torch.tensor(IX, requires_grad=True), labels),
        (torch.tensor(IX).to_sparse_csr(), labels.tolist()),
    ):
        model = SoftmaxClassifier().fit(x, y)
        np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-9)
        assert (model.predict(x) == expected.predict(IX)).all()
    assert list(SoftmaxClassifier().fit(frame, labels).feature_names_in_) == list("abcd")
    numbers = SoftmaxClassifier().fit(torch.tensor(IX), torch.tensor(IY), sample_weight=torch.ones(150))
    np.testing.assert_allclose(numbers.coef_, expected.coef_, atol=1e-9)
    assert numbers.classes_.tolist() == [0, 1, 2]


def test_warm_start_and_pickle() -> None:
    model = SoftmaxClassifier(C=1.0, warm_start=True).fit(DX, DY)
    again = model.n_iter_
    model.set_params(C=1.1).fit(DX, DY)
    assert model.n_iter_ < again
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.predict(DX), model.predict(DX))
    model.fit(IX, IY)  # another size starts anew
    assert model.coef_.shape == (3, 4)


def test_not_converged_warns() -> None:
    with pytest.warns(ConvergenceWarning, match="the dual gap is .* after .* passes, but tol is 1e-09"):
        model = SoftmaxClassifier(tol=1e-9, max_iter=3, C=100).fit(DX, DY)
    assert model.dual_gap_ > 1e-9


def test_search_agrees_with_scikit_learn() -> None:
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    model = SoftmaxClassifierCV(Cs=[1e-4, 1e-2, 1.0], cv=folds).fit(DX[:600], DY[:600])
    rival = LogisticRegressionCV(Cs=[1e-4, 1e-2, 1.0], cv=folds, l1_ratios=(0.0,), use_legacy_attributes=False,
                                 scoring="accuracy")  # fmt: skip
    rival.fit(DX[:600], DY[:600])
    assert float(rival.C_) == pytest.approx(model.C_)
    assert model.Cs_ == pytest.approx([1e-4, 1e-2, 1.0])
    # λ belongs to all samples, so a fold of two thirds is penalised a little more than scikit-learn's.
    assert np.abs(model.scores_ - rival.scores_.reshape(3, 3).mean(0)).max() < 0.04
    single = SoftmaxClassifier(C=model.C_).fit(DX[:600], DY[:600])
    np.testing.assert_allclose(model.coef_, single.coef_, atol=1e-6)


def test_search_over_a_torchlin_penalty() -> None:
    model = SoftmaxClassifierCV(Cs=4, cv=2, penalty=L1, standardize=True).fit(IX, IY)
    assert len(model.scores_) == 4
    assert model.strength_ in model.path_.strengths
    assert not hasattr(model, "C_")
    given = LinearSVMClassifierCV(Cs=[1e-1, 1e-3], cv=2, penalty=L2, loss="squared_hinge").fit(BX, BY)
    assert given.strength_ in (1e-1, 1e-3)
    assert given.coef_.shape == (1, 30)
    hinge = LinearSVMClassifierCV(Cs=[1e-3, 1e-2], cv=2, tol=1e-2).fit(BX, BY)
    assert hinge.score(BX, BY) > 0.9


def test_refusals() -> None:
    with pytest.raises(ValueError, match="C is a positive number"):
        SoftmaxClassifier(C=-1).fit(IX, IY)
    with pytest.raises(ValueError, match="multiclass: use SoftmaxClassifier"):
        LogisticClassifier().fit(IX, IY)
    with pytest.raises(ValueError, match=r"unknown loss 'squared' .*did you mean 'squared_hinge'"):
        LinearSVMClassifier(loss="squared").fit(IX, IY)
    with pytest.raises(ValueError, match="class 2 has weight 0"):
        SoftmaxClassifier().fit(IX, IY, sample_weight=(IY < 2).astype(float))
    with pytest.raises(TypeError, match="hinge loss is solved with an L2 penalty"):
        LinearSVMClassifier(l1_ratio=1.0).fit(IX, IY)
