"""The certified solvers as scikit-learn estimators: float64, C and l1_ratio with scikit-learn's meaning.

With N the sum of the sample and class weights and ρ = l1_ratio, scikit-learn's objective

    C Σ s_i L_i + ρ Σ|w| + ½(1 − ρ) Σ w²     is, divided by NC,     F = (1/N) Σ s_i L_i + λR(W)

with λ = (1 + ρ)/(2NC) and α = 2ρ/(1 + ρ). The intercept is never penalised.

Two classes have one row of coefficients w, and the penalty acts on that row. A loss with one score per class is then
solved in two rows ∓w/2, under the penalty that these have to have for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix, issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.utils import compute_class_weight
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from torchlin.features import FeatureMatrix
from torchlin.losses import LOSS_REGISTRY, LogisticLoss, Loss, SoftmaxLoss
from torchlin.penalties import ElasticNet, Penalty
from torchlin.registry import nearest
from torchlin.solvers import PathResult, Solution, solve, solve_path
from torchlin.solvers.path import Criterion, SharedGram

__all__ = [
    "LinearSVMClassifier",
    "LinearSVMClassifierCV",
    "LogisticClassifier",
    "LogisticClassifierCV",
    "SoftmaxClassifier",
    "SoftmaxClassifierCV",
]

Numbers = NDArray[np.float64]

# So many multiplications a pass may have for the last digits to be worth a few more passes.
_SMALL = 2e7


class _Problem:
    """What `fit` was given, as the solver takes it; rows that count nothing are left out."""

    def __init__(self, estimator: _Classifier, x: Any, y: NDArray[Any], sample_weight: ArrayLike | None) -> None:
        given = sample_weight is not None
        check_classification_targets(y)
        self.classes, encoded = np.unique(y, return_inverse=True)
        s: Numbers = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        per_class = compute_class_weight(estimator.class_weight, classes=self.classes, y=y, sample_weight=s)
        s = s * per_class[encoded]
        counts = s > 0
        present = np.unique(encoded[counts])
        if len(present) < 2:
            raise ValueError(
                f"a classifier tells at least two classes apart, but the samples that count are of {len(present)} class"
            )
        if len(present) < len(self.classes):
            absent = self.classes[np.setdiff1d(np.arange(len(self.classes)), present)].tolist()[0]
            raise ValueError(f"every sample of class {absent!r} has weight 0: leave them out")
        x = x[counts] if not counts.all() else x
        self.place = np.where(counts, np.cumsum(counts) - 1, -1)  # of each given row among those that count
        self.labels = encoded
        self.target = torch.from_numpy(encoded[counts].astype(np.int64))
        self.loss = estimator._loss_for(len(self.classes))
        self.outputs = self.loss.outputs(len(self.classes))
        weighted = given or estimator.class_weight is not None
        self.weight = torch.from_numpy(s[counts]) if weighted else None
        self.total = float(s.sum())
        self.features = SharedGram(
            FeatureMatrix.of(
                _tensor(x), standardize=estimator.standardize, weight=self.weight, dtype=torch.float64,
                device=estimator.device,
            )
        )  # fmt: skip

    def on_rows(self, penalty: Penalty) -> Penalty:
        """The penalty of two rows ∓w/2 that is the given one of the row w: Σ|w| stays, Σ w² is halved."""
        if not (self.outputs == 2 == len(self.classes)):
            return penalty
        strength = penalty.l1 + 2 * penalty.l2
        return ElasticNet(strength, penalty.l1 / strength if strength > 0 else 0.0)


class _Classifier(ClassifierMixin, BaseEstimator):
    """What all of them share: one fit, one decision."""

    fit_intercept: bool
    standardize: bool
    class_weight: Any
    max_iter: int
    tol: float
    device: Any

    def _loss_for(self, num_classes: int) -> Loss:
        raise NotImplementedError

    def _fit(self, problem: _Problem) -> Solution:
        raise NotImplementedError

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> _Classifier:
        """Solve for X (n, p) and labels y (n,), each sample counting `sample_weight` (n,) ≥ 0 times.

        X is a numpy array, a pandas frame, a torch tensor, or CSR of scipy or torch; its numbers are taken as they are
        (uint8 too). Where `tol` was not reached in `max_iter` passes there is a ConvergenceWarning.
        """
        x, labels = validate_data(self, _array(X), _array(y), accept_sparse="csr", dtype=np.float64, order="C")
        problem = _Problem(self, x, labels, _array(sample_weight))
        solution = self._fit(problem)
        if solution.gap > self.tol:
            warnings.warn(
                f"the dual gap is {solution.gap:.2g} after {solution.passes:g} passes, but tol is {self.tol:g}: "
                "raise max_iter, standardize, or take a larger tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        weight, bias = (t.detach().cpu().double().numpy() for t in (solution.weight, solution.bias))
        if len(problem.classes) == 2 == len(weight):
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        self.classes_ = problem.classes
        self.coef_, self.intercept_ = weight, bias
        self.dual_gap_ = solution.gap
        self.n_iter_ = max(1, math.ceil(solution.passes))
        self._solution = replace(solution, history=())
        return self

    def _start(self, problem: _Problem) -> Solution | None:
        """The last solution, if it is one of the same size."""
        last = getattr(self, "_solution", None)
        if not getattr(self, "warm_start", False) or last is None:
            return None
        same = last.weight.shape == (problem.outputs, problem.features.shape[1])
        return last if same and np.array_equal(self.classes_, problem.classes) else None

    def decision_function(self, X: Any) -> Numbers:
        """Scores, (n, k); with two classes (n,), positive for classes_[1]."""
        check_is_fitted(self)
        x = validate_data(self, _array(X), accept_sparse="csr", dtype=np.float64, reset=False)
        scores: Numbers = safe_sparse_dot(x, self.coef_.T, dense_output=True) + self.intercept_
        return scores.ravel() if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """The class with the largest score, (n,)."""
        scores = self.decision_function(X)
        labels: NDArray[Any] = self.classes_[(scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(1)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class _Single(_Classifier):
    """One strength."""

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        penalty: Penalty | None = None,
        fit_intercept: bool = True,
        standardize: bool = False,
        class_weight: Any = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
        device: Any = None,
    ) -> None:
        self.C = C
        self.l1_ratio = l1_ratio
        self.penalty = penalty
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.device = device

    def _fit(self, problem: _Problem) -> Solution:
        penalty = penalty_of(self.C, self.l1_ratio, problem.total) if self.penalty is None else self.penalty
        return _polished(self, problem, problem.on_rows(penalty), self._start(problem))


class _Searched(_Classifier):
    """The strength chosen by cross-validation."""

    def __init__(
        self,
        Cs: int | Iterable[float] = 10,
        *,
        cv: Any = 5,
        criterion: Criterion = "accuracy",
        l1_ratio: float = 0.0,
        penalty: Callable[[float], Penalty] | None = None,
        fit_intercept: bool = True,
        standardize: bool = False,
        class_weight: Any = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        device: Any = None,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.criterion = criterion
        self.l1_ratio = l1_ratio
        self.penalty = penalty
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.tol = tol
        self.device = device

    def _fit(self, problem: _Problem) -> Solution:
        ratio, total = self.l1_ratio, problem.total
        given = self.penalty
        family = given if given is not None else lambda s: penalty_of((1 + ratio) / (2 * total * s), ratio, total)
        strengths = num = None
        if isinstance(self.Cs, (int, np.integer)):
            num = int(self.Cs)
            if given is None:
                strengths = [strength_of(c, ratio, total) for c in np.logspace(-4, 4, num)]
        else:
            strengths = [s if given is not None else strength_of(s, ratio, total) for s in self.Cs]
        y = problem.labels
        splits = check_cv(self.cv, y, classifier=True).split(np.zeros((len(y), 1)), y)
        places = [problem.place[test] for _, test in splits]
        path = solve_path(
            problem.features, problem.target, problem.loss, lambda s: problem.on_rows(family(s)), strengths=strengths,
            num=num or 1, folds=[torch.from_numpy(at[at >= 0]) for at in places], criterion=self.criterion,
            tol=self.tol, max_passes=self.max_iter, bias=self.fit_intercept, sample_weight=problem.weight,
            on_failure="return",
        )  # fmt: skip
        index = cast("int", path.index)
        chosen = path.strengths[index]
        self.path_: PathResult = path
        self.strength_ = chosen
        self.scores_ = np.array(path.val_accuracy)
        if given is None:
            self.Cs_ = np.array([strength_of(s, ratio, total) for s in path.strengths])  # its own inverse
            self.C_ = float(self.Cs_[index])
        return _polished(self, problem, problem.on_rows(family(chosen)), path.chosen)


class _Probabilities(_Classifier):
    """Losses that are likelihoods."""

    def predict_proba(self, X: Any) -> Numbers:
        """Class probabilities, (n, k)."""
        scores = torch.from_numpy(np.atleast_1d(self.decision_function(X)))
        loss = LogisticLoss() if scores.dim() == 1 else SoftmaxLoss()
        shares: Numbers = loss.probabilities(scores).numpy()
        return shares

    def predict_log_proba(self, X: Any) -> Numbers:
        """Their logarithms."""
        scores = torch.from_numpy(self.decision_function(X))
        if scores.dim() == 1:
            scores = torch.stack((torch.zeros_like(scores), scores), 1)
        logarithms: Numbers = torch.log_softmax(scores, 1).numpy()
        return logarithms


class _Softmax(_Probabilities):
    def _loss_for(self, num_classes: int) -> Loss:
        return LogisticLoss() if num_classes == 2 else SoftmaxLoss()


class _Logistic(_Probabilities):
    def _loss_for(self, num_classes: int) -> Loss:
        if num_classes > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass: use SoftmaxClassifier"
            )
        return LogisticLoss()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


SVMLoss = Literal["hinge", "crammer_singer", "squared_hinge"]
_SVM_LOSSES = ("hinge", "crammer_singer", "squared_hinge")


class _SVM(_Classifier):
    loss: str

    def _loss_for(self, num_classes: int) -> Loss:
        if self.loss not in _SVM_LOSSES:
            hint = nearest(str(self.loss), _SVM_LOSSES)
            raise ValueError(f"unknown loss {self.loss!r}{hint}; known: {', '.join(_SVM_LOSSES)}")
        return LOSS_REGISTRY.make(self.loss)


_PARAMETERS = """
    Args:
        C: inverse strength, > 0, with scikit-learn's meaning; infinite for no penalty.
        l1_ratio: ρ in [0, 1], scikit-learn's share of the L1 part.
        penalty: a torchlin penalty such as `L2(1e-3)`, which replaces both.
        fit_intercept: False leaves the intercept at 0; `standardize`, which centres, is then an error.
        standardize: put the penalty on the weights of standardised features. `coef_` acts on X as it is, all the same.
        class_weight: None, "balanced" or a mapping from labels to weights.
        max_iter: passes over the data.
        tol: the certified relative gap, (F − F*)/F at most, to stop at. Small smooth problems are then solved to the
            last digits.
        warm_start: whether `fit` starts at the last solution.
        device: where to compute, for example "cuda".

    Attributes:
        coef_, intercept_: (k, p) and (k,); with two classes (1, p) and (1,).
        classes_: the labels. n_features_in_, feature_names_in_: as in scikit-learn.
        dual_gap_: the certified relative gap. n_iter_: passes over the data.
"""
_PARAMETERS_CV = """
    Args:
        Cs: how many C between 1e-4 and 1e4, or the C themselves.
        cv: folds, or a splitter of scikit-learn. λ belongs to all samples and stays the same in the folds.
        criterion: "accuracy" or "loss"; of equals the strongest penalty.
        l1_ratio: ρ in [0, 1], scikit-learn's share of the L1 part.
        penalty: λ ↦ torchlin penalty, such as `L1`, which replaces both: `Cs` then means the λ, or how many of them.
        fit_intercept, standardize, class_weight, max_iter, tol, device: see the class without CV.

    Attributes:
        C_, Cs_: the chosen C and all of them, if C was searched. strength_: the chosen λ.
        scores_: accuracy for each λ, the strongest first, over the samples left out. path_: the `PathResult`.
        coef_, intercept_, classes_, dual_gap_, n_iter_: see the class without CV.
"""


class SoftmaxClassifier(_Softmax, _Single):
    """Softmax regression, scikit-learn's `LogisticRegression`. Two classes: the logistic loss on one row."""


class SoftmaxClassifierCV(_Softmax, _Searched):
    """Softmax regression whose C is chosen by cross-validation. Two classes: the logistic loss on one row."""


class LogisticClassifier(_Logistic, _Single):
    """Logistic regression for two classes."""


class LogisticClassifierCV(_Logistic, _Searched):
    """Logistic regression for two classes whose C is chosen by cross-validation."""


class LinearSVMClassifier(_SVM, _Single):
    """Linear support vector machine: `loss` "hinge" (Weston–Watkins), "crammer_singer" or "squared_hinge".

    The first two take L2 only. With two classes they are the same, scikit-learn's `LinearSVC(loss="hinge")` but for
    its penalty on the intercept.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        loss: SVMLoss = "hinge",
        l1_ratio: float = 0.0,
        penalty: Penalty | None = None,
        fit_intercept: bool = True,
        standardize: bool = False,
        class_weight: Any = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__(
            C, l1_ratio=l1_ratio, penalty=penalty, fit_intercept=fit_intercept, standardize=standardize,
            class_weight=class_weight, max_iter=max_iter, tol=tol, warm_start=warm_start, device=device,
        )  # fmt: skip
        self.loss = loss


class LinearSVMClassifierCV(_SVM, _Searched):
    """Linear support vector machine whose C is chosen by cross-validation; `loss` as in `LinearSVMClassifier`."""

    def __init__(
        self,
        Cs: int | Iterable[float] = 10,
        *,
        loss: SVMLoss = "hinge",
        cv: Any = 5,
        criterion: Criterion = "accuracy",
        l1_ratio: float = 0.0,
        penalty: Callable[[float], Penalty] | None = None,
        fit_intercept: bool = True,
        standardize: bool = False,
        class_weight: Any = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        device: Any = None,
    ) -> None:
        super().__init__(
            Cs, cv=cv, criterion=criterion, l1_ratio=l1_ratio, penalty=penalty, fit_intercept=fit_intercept,
            standardize=standardize, class_weight=class_weight, max_iter=max_iter, tol=tol, device=device,
        )  # fmt: skip
        self.loss = loss


for _cls in (SoftmaxClassifier, LogisticClassifier, LinearSVMClassifier):
    _cls.__doc__ = f"{_cls.__doc__}\n{_PARAMETERS}"
for _searched in (SoftmaxClassifierCV, LogisticClassifierCV, LinearSVMClassifierCV):
    _searched.__doc__ = f"{_searched.__doc__}\n{_PARAMETERS_CV}"


def strength_of(C: float, l1_ratio: float, total: float) -> float:
    """λ = (1 + ρ)/(2NC), and, being its own inverse, C from λ."""
    if not (C > 0 and 0 <= l1_ratio <= 1):
        raise ValueError(f"C is a positive number and l1_ratio is in [0, 1], got C={C}, l1_ratio={l1_ratio}")
    return (1 + l1_ratio) / (2 * total * C)


def penalty_of(C: float, l1_ratio: float, total: float) -> Penalty:
    """scikit-learn's penalty in torchlin's words."""
    return ElasticNet(strength_of(C, l1_ratio, total), 2 * l1_ratio / (1 + l1_ratio))


def _polished(estimator: _Classifier, problem: _Problem, penalty: Penalty, start: Solution | None) -> Solution:
    """Solve to `tol`, and small smooth problems on to what float64 can hold: Newton's last steps cost nothing."""
    given = None if penalty.strength == 0 else penalty

    def run(tol: float, passes: float, warm: Solution | None) -> Solution:
        return solve(
            problem.features, problem.target, problem.loss, given, num_classes=len(problem.classes), tol=tol,
            max_passes=passes, bias=estimator.fit_intercept, sample_weight=problem.weight, warm_start=warm,
            on_failure="return",
        )  # fmt: skip

    found = run(estimator.tol, estimator.max_iter, start)
    n, p = problem.features.shape
    smooth = problem.loss.smoothness(problem.outputs) is not None
    if found.converged and smooth and n * p * problem.outputs <= _SMALL:
        better = run(1e-15, 10, found)
        # F agrees in all its digits by now; W gains from every one of Newton's steps.
        if better.gap <= max(found.gap, 1e-9):
            found = replace(better, passes=found.passes + better.passes)
    return found


def _array(values: Any) -> Any:
    """torch tensors as numpy arrays or scipy's CSR; everything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    if values.layout != torch.sparse_csr:
        return values.numpy()
    parts = (values.values(), values.col_indices(), values.crow_indices())
    return csr_matrix(tuple(t.numpy() for t in parts), shape=tuple(values.shape))


def _tensor(x: Any) -> Tensor:
    if not issparse(x):
        return torch.from_numpy(x if x.flags.writeable else x.copy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(x.indptr.astype(np.int64)), torch.from_numpy(x.indices.astype(np.int64)),
            torch.from_numpy(x.data), x.shape, check_invariants=True,
        )  # fmt: skip
