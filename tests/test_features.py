"""X̃ and its products, in every kind, against the matrix written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchlin.features import FeatureMatrix, PixelFeatures
from torchlin.integers import int8_products

N, P, K = 203, 37, 3


def pixels(n: int = N, p: int = P) -> Tensor:
    x = torch.randint(0, 256, (n, p), dtype=torch.uint8)
    x[:, 0] = 77  # constant
    return x


KINDS = {
    "float64": lambda: torch.randn(N, P, dtype=torch.float64) * 3 + 100,
    "float32": lambda: torch.randn(N, P),
    "bfloat16": lambda: torch.randn(N, P).bfloat16(),
    "pixels": pixels,
    "images": lambda: pixels(N, 48).view(N, 3, 4, 4),
    "sparse": lambda: (torch.rand(N, P, dtype=torch.float64) * (torch.rand(N, P) < 0.1)).to_sparse_csr(),
}


def plain(x: Tensor, standardize: bool, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    raw = x.to_dense() if x.layout == torch.sparse_csr else x
    raw = raw.flatten(1).double() / (255 if x.dtype == torch.uint8 else 1)
    s = torch.ones(len(raw), dtype=torch.float64) if weight is None else weight.double()
    mean = s @ raw / s.sum()
    std = (s @ (raw - mean).square() / s.sum()).sqrt()
    std = torch.where(std < 1e-12, 1.0, std)
    if not standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return (raw - mean) / std, mean, std


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("standardize", [True, False], ids=["standardised", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, standardize: bool, weighted: bool) -> None:
    x = KINDS[kind]()
    weight = torch.rand(N) if weighted else None
    f = FeatureMatrix.of(x, standardize=standardize, weight=weight)
    expected, mean, std = plain(x, standardize, weight)
    p = expected.shape[1]
    assert f.shape == (N, p)
    exact = f.dtype == torch.float64
    near = {"rtol": 1e-7, "atol": 1e-7} if exact else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(f.standardization.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(f.standardization.std, std, rtol=1e-6, atol=1e-9)
    w, b, g = (torch.randn(*size, dtype=torch.float64) for size in ((K, p), (K,), (N, K)))
    torch.testing.assert_close(f.scores(w, b).double(), expected @ w.T + b, **near)
    torch.testing.assert_close(f.scores(w).double(), expected @ w.T, **near)
    ones = torch.ones(N, 1, dtype=torch.float64)
    torch.testing.assert_close(f.gradient(g).double(), g.T @ torch.cat((expected, ones), 1), **near)
    torch.testing.assert_close(f.gram().double(), expected.T @ expected, **near)
    s = torch.rand(N, dtype=torch.float64)
    near_float32 = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(f.gram(s).double(), expected.T @ (expected * s.unsqueeze(1)), **near_float32)
    torch.testing.assert_close(f.kernel().double(), expected @ expected.T, **near)
    index = torch.tensor([5, 0, 5, 202])
    torch.testing.assert_close(f.rows(index).double(), expected[index], **near)
    torch.testing.assert_close(f.rows(slice(3, 7)).double(), expected[3:7], **near)
    some = torch.tensor([0, 4, 5, p - 1])
    torch.testing.assert_close(f.columns(some).double(), expected[:, some], **near)


def test_int8_and_float64_agree_in_every_bit_and_so_do_threads() -> None:
    x = pixels(5000, 300)
    w, g = torch.randn(4, 300, dtype=torch.float64), torch.randn(5000, 4, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    for limbs in (True, False):
        f = FeatureMatrix.of(x)
        assert isinstance(f, PixelFeatures)
        f._limbs = limbs
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((f.scores(w), f.gradient(g), f.gram(), f.standardization.mean, f.standardization.std))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("n", "p"), [(200_000, 8), (4, 200_000)])
def test_extreme_values_do_not_overflow(n: int, p: int) -> None:
    for fill in (0, 255):
        x = torch.full((n, p), fill, dtype=torch.uint8)
        f = FeatureMatrix.of(x, standardize=False)
        w = torch.ones(2, p, dtype=torch.float64)
        assert torch.equal(f.scores(w), torch.full((n, 2), p * fill / 255, dtype=torch.float64).round(decimals=6)) or (
            (f.scores(w) - p * fill / 255).abs().max() < 1e-6
        )
        g = torch.ones(n, 2, dtype=torch.float64)
        torch.testing.assert_close(f.gradient(g)[:, :-1], torch.full((2, p), n * fill / 255, dtype=torch.float64))


def test_large_means_do_not_cancel() -> None:
    x = torch.randn(500, 6, dtype=torch.float64) + 1e8
    f = FeatureMatrix.of(x)
    torch.testing.assert_close(f.standardization.std, x.std(0, correction=0), rtol=1e-6, atol=0)


def test_the_self_test_has_an_answer() -> None:
    assert int8_products("cpu") in (True, False)


def test_bad_features() -> None:
    x = torch.randn(5, 3)
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match="row 3 has a NaN"):
        FeatureMatrix.of(x)
    with pytest.raises(ValueError, match="row 3 has a NaN"):
        FeatureMatrix.of(x.to_sparse_csr())
    with pytest.raises(TypeError, match=r"torch.int64: use features.float\(\)"):
        FeatureMatrix.of(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"n and p at least 1, got shape \(0, 3\)"):
        FeatureMatrix.of(torch.ones(0, 3))
