"""Certificates of heads that no solver made."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchlin import (
    L1,
    L2,
    ElasticNet,
    FeatureMatrix,
    HingeLoss,
    LinearHead,
    LogisticLoss,
    Loss,
    Penalty,
    PerceptronLoss,
    SoftmaxLoss,
    SquaredHingeLoss,
    Standardization,
    absorb_bias,
    certify,
    solve,
)
from torchlin.heads import StandardizedHead
from torchlin.solvers.certify import MovedFeatures


def data(n: int = 150, p: int = 6, k: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) + 0.7 * torch.eye(k, p).double()[y]
    return x * torch.linspace(0.5, 4, p).double() + 3, y


def trained(loss: Loss, penalty: Penalty, x: torch.Tensor, y: torch.Tensor, steps: int) -> LinearHead:
    """What a few hundred steps of plain gradient descent on standardised features leave."""
    mean, std = x.mean(0), x.std(0, correction=0)
    z = (x - mean) / std
    k = loss.outputs(int(y.max()) + 1)
    w = torch.zeros(k, x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        slopes = torch.autograd.grad(loss(z @ w.T + b, y) + penalty.value(w), (w, b))
        with torch.no_grad():
            for t, slope in zip((w, b), slopes, strict=True):
                t -= 0.05 * slope
    head = LinearHead(x.shape[1], k, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(w / std)
        head.bias.copy_(b - (w / std) @ mean)
    return head


def objective(loss: Loss, penalty: Penalty, head: LinearHead, x: torch.Tensor, y: torch.Tensor) -> float:
    w = head.weight.detach() * x.std(0, correction=0)
    return float(loss(head(x).detach(), y) + penalty.value(w))


@pytest.mark.parametrize("penalty", [L2(1e-2), L1(2e-2), ElasticNet(2e-2, 0.5)], ids=repr)
@pytest.mark.parametrize("loss", [SoftmaxLoss(), LogisticLoss(), SquaredHingeLoss(margin=0.5)], ids=lambda v: v.name)
def test_smooth_losses(loss: Loss, penalty: Penalty) -> None:
    x, y = data(k=2 if loss.name == "logistic" else 3)
    best = solve(x, y, loss, penalty, tol=1e-7).objective
    gaps = []
    for steps in (30, 600):
        head = trained(loss, penalty, x, y, steps)
        found = certify(head, x, y, loss, penalty)
        assert found.measure == "gap"
        assert found.primal == pytest.approx(objective(loss, penalty, head, x, y), rel=1e-12)
        assert found.dual <= best + 1e-12
        assert found.primal >= best - 1e-12
        sharper = certify(head, x, y, loss, penalty, tol=1e-6)
        assert found.dual - 1e-15 <= sharper.dual <= best + 1e-12
        assert sharper.primal - sharper.dual == pytest.approx(sharper.primal - best, abs=2e-6)
        gaps.append(found.gap)
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("penalty", [L2(1e-3), L1(1e-3)], ids=repr)
def test_what_the_solver_hands_out_is_certified_as_it_said(penalty: Penalty) -> None:
    x, y = data()
    solution = solve(x, y, "softmax", penalty, tol=1e-6)
    found = certify(solution.to_head(torch.float64), x, y, "softmax", penalty)
    assert found.gap <= 2e-6
    assert found.primal == pytest.approx(solution.objective, rel=1e-12)


def test_hinge_heads_by_the_dual_solver() -> None:
    x, y = data()
    loss, penalty = HingeLoss(), L2(1e-2)
    best = solve(x, y, loss, penalty, tol=1e-4)
    head = trained(loss, penalty, x, y, 300)
    found = certify(head, x, y, loss, penalty, tol=1e-3)
    assert found.dual <= best.objective
    assert found.primal - found.dual == pytest.approx(found.primal - best.objective, abs=1.2e-3 * best.objective)
    coarse = certify(head, x, y, loss, penalty)
    assert coarse.dual <= best.objective
    assert coarse.primal == found.primal
    short = certify(head, x, y, loss, penalty, tol=1e-9, max_passes=5)
    assert 0 <= short.dual <= best.objective


def test_where_there_is_no_gap_it_says_why() -> None:
    x, y = data()
    head = trained(SoftmaxLoss(), L2(1e-2), x, y, 100)
    found = certify(head, x, y, "softmax", None, tol=1e-3)
    assert (found.measure, found.dual) == ("gradient", float("-inf"))
    assert "λ = 0" in found.reason
    for loss, penalty in ((PerceptronLoss(), L2(1.0)), (HingeLoss(), L1(0.1)), (HingeLoss(), None)):
        found = certify(head, x, y, loss, penalty)
        assert found.measure == "objective"
        assert found.gap == found.primal > 0
        assert loss.name in found.reason


def test_coordinates() -> None:
    x, y = data()
    head = trained(SoftmaxLoss(), L2(1e-2), x, y, 200)
    mean, std = x.mean(0), x.std(0, correction=0)
    own = certify(head, x, y, "softmax", L2(1e-2))
    given = certify(head, x, y, "softmax", L2(1e-2), standardize=Standardization(mean.float(), std.float()))
    assert given.gap == pytest.approx(own.gap, rel=1e-5)
    raw = certify(head, x, y, "softmax", L2(1e-2), standardize=False)
    same = certify(head, x, y, "softmax", L2(1e-2), standardize=Standardization(0 * mean, std / std))
    assert raw.gap == pytest.approx(same.gap, rel=1e-9)
    assert raw.primal != pytest.approx(own.primal, rel=1e-3)
    with pytest.raises(ValueError, match="standardization of 2 features, but there are 6"):
        certify(head, x, y, "softmax", None, standardize=Standardization(mean[:2], std[:2]))


def test_moved_features_multiply_as_their_rows_do() -> None:
    x, _ = data(40, 5)
    to = Standardization(torch.linspace(-1, 2, 5).double(), torch.linspace(0.5, 2, 5).double())
    z = (x - to.mean) / to.std
    for inner in (FeatureMatrix.of(x), FeatureMatrix.of(x, standardize=False), FeatureMatrix.of(x.to_sparse_csr())):
        moved = MovedFeatures(inner, to)
        w, b, g, s = torch.randn(3, 5).double(), torch.randn(3).double(), torch.randn(40, 3).double(), torch.rand(40)
        torch.testing.assert_close(moved.rows(slice(3, 9)), z[3:9])
        torch.testing.assert_close(moved.scores(w, b), F.linear(z, w, b))
        torch.testing.assert_close(moved.gradient(g), torch.cat((g.T @ z, g.sum(0).unsqueeze(1)), 1))
        torch.testing.assert_close(moved.gram(), z.T @ z)
        torch.testing.assert_close(moved.gram(s), z.T @ (z * s.double().unsqueeze(1)))
        torch.testing.assert_close(moved.kernel(), z @ z.T)


def test_every_kind_of_head_and_weights() -> None:
    x, y = data()
    plain = trained(SoftmaxLoss(), L2(1e-2), x, y, 200).float()
    expected = certify(plain, x, y, "softmax", L2(1e-2))
    standardized = StandardizedHead(6, 3)
    with torch.no_grad():
        standardized.weight.copy_(plain.weight)
        standardized.bias.copy_(plain.bias)
    standardized.restandardize(Standardization(x.mean(0), x.std(0, correction=0)))
    for head in (absorb_bias(plain), standardized):
        assert certify(head, x, y, "softmax", L2(1e-2)).gap == pytest.approx(expected.gap, rel=1e-3)
    counts = torch.randint(0, 3, (len(y),))
    weighted = certify(plain, x, y, "softmax", L2(1e-2), sample_weight=counts.double())
    repeated = certify(plain, x.repeat_interleave(counts, 0), y.repeat_interleave(counts), "softmax", L2(1e-2))
    assert weighted.gap == pytest.approx(repeated.gap, rel=1e-9)
    balanced = certify(plain, x, y, SoftmaxLoss(weight=[1.0, 2.0, 3.0]), L2(1e-2))
    assert balanced.gap == certify(plain, x, y, "softmax", L2(1e-2), class_weight=[1.0, 2.0, 3.0]).gap


def test_pixels() -> None:
    pixels = torch.randint(0, 256, (90, 2, 3), dtype=torch.uint8)
    y = torch.arange(90) % 3
    head = LinearHead(6, 3)
    one, two = (certify(head, x, y, "softmax", L2(0.1)) for x in (pixels, pixels.flatten(1).double() / 255))
    assert one.gap == pytest.approx(two.gap, rel=1e-9)


def test_sizes_that_do_not_fit() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="in_features=5, but there are 6 features"):
        certify(LinearHead(5, 3), x, y, "softmax", None)
    with pytest.raises(ValueError, match="150 rows and target has 149"):
        certify(LinearHead(6, 3), x, y[1:], "softmax", None)
