"""Standardisation against NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch

from torchlin.data.loading import ArrayDataset
from torchlin.data.standardize import standardize_features, standardize_pixels


def blocks_of(inputs: torch.Tensor) -> ArrayDataset:
    return ArrayDataset(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def test_pixels_equal_numpy_over_several_blocks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (140_000, 1, 2, 4), dtype=np.uint8)
    pixels[:, 0, 0, 0] = 255
    pixels[:, 0, 0, 1] = 7
    pixels[:, 0, 0, 2] = 255 * (np.arange(140_000) == 3)
    pixels[:, 0, 0, 3] = 255 * (np.arange(140_000) % 2)  # Σ(x − q)² beyond 32 bits
    dataset = blocks_of(torch.from_numpy(pixels))
    assert len(list(dataset.blocks())) > 2
    mean, std = standardize_pixels(dataset.blocks)
    scaled = pixels.reshape(140_000, -1).astype(np.float64) / 255
    expected = scaled.std(0)
    expected[:2] = 1
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), scaled.mean(0), rtol=2**-23)
    np.testing.assert_allclose(std.numpy(), expected, rtol=2**-23)
    assert std[:2].tolist() == [1, 1]


def test_pixels_do_not_depend_on_the_blocks() -> None:
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (999, 3, 2, 2), dtype=np.uint8))
    whole = standardize_pixels(lambda: [pixels])
    parts = standardize_pixels(lambda: pixels[torch.randperm(999)].split(100))
    assert torch.equal(whole.mean, parts.mean)
    assert torch.equal(whole.std, parts.std)


def test_features_equal_numpy_with_a_large_offset_and_constant_columns() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5000, 5)).astype(np.float32)
    features[:, 1] += 1e5
    features[:, 2] = 0.1
    features[:, 3] *= 1e-20
    features[:, 4] = 1e30
    tensor = torch.from_numpy(features)
    mean, std = standardize_features(lambda: tensor.split(999))
    exact = features.astype(np.float64)
    expected = exact.std(0)
    expected[[2, 4]] = 1
    np.testing.assert_allclose(mean.numpy(), exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), expected, rtol=1e-6)
    assert std[[2, 4]].tolist() == [1, 1]
    assert mean[2] == tensor[0, 2]


def test_one_row() -> None:
    one = torch.tensor([[3.0, -1.0]])
    assert standardize_features(lambda: [one]).std.tolist() == [1, 1]
