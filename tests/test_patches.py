"""The patch features against their definition, written out patch by patch in float64."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from torchlin import L2, patches, solve
from torchlin.data import ImageFolderDataModule
from torchlin.patches import PatchFeatures, bfloat16_products

CIFAR10 = os.environ.get("TORCHLIN_CIFAR10_FOLDER")


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_SAMPLES", 2000)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine: bfloat16 has a test of its own."""
    monkeypatch.setattr(patches, "bfloat16_products", lambda device: False)


def textures(n: int, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    """Smooth colours and noise, of much and little contrast."""
    coarse = torch.randn(n, channels, 4, 4) * torch.rand(n, 1, 1, 1) * 90
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (128 + smooth + 8 * torch.randn(n, channels, height, width)).clamp(0, 255).to(torch.uint8)


class Learned(NamedTuple):
    """m (q,), P (q, q) and d (K, q)."""

    mean: Tensor
    whiten: Tensor
    directions: Tensor


def hat(x: Tensor, contrast: float) -> Tensor:
    """x̂ of one patch, flattened."""
    x = x.double().flatten()
    return (x - x.mean()) / (x.var(correction=0) + contrast).sqrt()


def learned(f: PatchFeatures, images: Tensor) -> Learned:
    """What `fit` learns before it folds, from the same random patches."""
    generator = torch.Generator().manual_seed(f.seed)
    sample = torch.stack([hat(x, f.contrast) for x in f._sample(images, generator)])
    mean, covariance = sample.mean(0), torch.cov(sample.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag((values + f.whitening) ** -0.5) @ vectors.T
    chosen = sample[torch.randperm(len(sample), generator=generator)[: f.patches]]
    directions = torch.stack([whiten @ (x - mean) for x in chosen])
    return Learned(mean, whiten, nn.functional.normalize(directions, dim=1))


def encoded(f: PatchFeatures, by: Learned, image: Tensor) -> Tensor:
    """The features of one image, (pool, pool, 2, K)."""
    s = f.patch_size
    responses = torch.empty(f.patches, image.shape[1] - s + 1, image.shape[2] - s + 1, dtype=torch.float64)
    for y in range(responses.shape[1]):
        for x in range(responses.shape[2]):
            w = by.whiten @ (hat(image[:, y : y + s, x : x + s], f.contrast) - by.mean)
            responses[:, y, x] = by.directions @ w
    parts = torch.stack((responses - f.threshold, -responses - f.threshold)).clamp(min=0)
    return nn.functional.adaptive_avg_pool2d(parts, f.pool).permute(2, 3, 0, 1)


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize(
    ("shape", "size", "pool", "threshold"),
    [
        ((3, 12, 12), 6, 2, 0.25),
        ((1, 9, 14), 3, 3, 0.0),
        ((3, 7, 6), 5, 2, 0.5),
        ((2, 8, 5), 1, 1, 0.5),
        ((1, 6, 6), 6, 1, 0.1),
    ],
    ids=["colour", "gray", "small", "pixels", "one"],
)
def test_features_are_what_the_docstring_defines(
    shape: tuple[int, int, int], size: int, pool: int, threshold: float, flip: bool
) -> None:
    images = textures(30, *shape)
    f = PatchFeatures(7, size, pool, threshold, flip=flip, seed=3).fit(images)
    by = learned(f, images)
    # Images of other sizes have the same features.
    for some in (images[:3], textures(1, shape[0], 17, 13)):
        out = f(some)
        assert out.shape == (len(some), f.out_features) == (len(some), 2 * 7 * pool**2)
        assert out.dtype == torch.float32
        expected = torch.stack([encoded(f, by, image) for image in some])
        if flip:
            expected = (expected + torch.stack([encoded(f, by, image) for image in some.flip(3)])) / 2
        torch.testing.assert_close(out.view(expected.shape).double(), expected, rtol=1e-5, atol=1e-5)


def test_filters_hold_everything_linear() -> None:
    images = textures(30)
    f = PatchFeatures(7, 4).fit(images)
    by = learned(f, images)
    assert f.filters is not None
    assert f.offset is not None
    assert f.filters.shape == (7, 3, 4, 4)
    torch.testing.assert_close(f.filters.flatten(1).double(), by.directions @ by.whiten, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(f.offset.double(), by.directions @ by.whiten @ by.mean, rtol=1e-5, atol=1e-6)
    # In float64 nothing but rounding of the filters is left.
    x = hat(images[0, :, :4, :4], f.contrast)
    a, b = f.filters.flatten(1).double(), f.offset.double()
    torch.testing.assert_close(a @ x - b, by.directions @ by.whiten @ (x - by.mean), rtol=1e-5, atol=1e-5)
    double = copy.deepcopy(f).double()
    assert double(images).dtype == torch.float64
    torch.testing.assert_close(double(images), f(images).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("count", [5, 300, 1600], ids="patches={}".format)
def test_features_of_an_image_do_not_depend_on_its_batch(count: int, flip: bool) -> None:
    images = textures(38, 3, 32, 32)
    f = PatchFeatures(count, flip=flip).fit(images)
    together = f(images)
    for size in (1, 2, 37):
        some = images[:3] if size < 3 else images
        assert torch.equal(torch.cat([f(part) for part in some.split(size)]), together[: len(some)])
    assert torch.equal(f(images.flip(0)), together.flip(0))
    assert f(images[:0]).shape == (0, f.out_features)
    assert torch.equal(f(images.contiguous(memory_format=torch.channels_last)), together)


def test_blocks_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    images = textures(5, 3, 20, 23)
    for flip in (False, True):
        f = PatchFeatures(20, flip=flip).fit(images)
        whole = f(images)
        with monkeypatch.context() as patch:
            patch.setattr(patches, "_CPU_BYTES", 7 * 20 * 4)  # 7 positions of one image at a time
            torch.testing.assert_close(f(images), whole, rtol=1e-5, atol=1e-6)
            assert torch.equal(f(images[2:3]), f(images)[2:3])


def test_an_image_and_its_mirror_image_have_the_same_features() -> None:
    images = textures(10, 3, 15, 11)
    f = PatchFeatures(20, flip=True).fit(images)
    torch.testing.assert_close(f(images), f(images.flip(3)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(f(images), f(images.flip(2)), rtol=0.1)


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
def test_bfloat16_is_near(flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = textures(20, 3, 16, 16)
    f = PatchFeatures(40, flip=flip).fit(images)
    exact = f(images)
    monkeypatch.setattr(patches, "bfloat16_products", lambda device: True)
    near = f(images)
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.01
    assert torch.equal(torch.cat([f(part) for part in images.split(3)]), near)


def test_the_self_test_has_an_answer() -> None:
    assert bfloat16_products("cpu") in (True, False)


class OnRequest:
    """Images that are made when they are asked for."""

    dtype, device, shape = torch.uint8, torch.device("cpu"), torch.Size((30, 3, 12, 12))

    def __init__(self) -> None:
        self.images, self.largest = textures(30), 0

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        self.largest = max(self.largest, len(index))
        return self.images.index_select(dim, index)


def test_fit_depends_on_images_options_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source = OnRequest()
    f = PatchFeatures(9).fit(source.images)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = PatchFeatures(9).fit(source)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(f(source.images), again(source.images))
    other = PatchFeatures(9, seed=1).fit(source)
    assert not torch.allclose(f(source.images), other(source.images))
    assert torch.equal(other.fit(source)(source.images), other(source.images))
    monkeypatch.setattr(patches, "_GATHERED", 4 * 3 * 12 * 12)
    source.largest = 0
    assert torch.equal(f(source.images), PatchFeatures(9).fit(source)(source.images))
    assert source.largest == 4
    monkeypatch.setattr(patches, "_IMAGES", 20)
    assert not torch.equal(f(source.images), PatchFeatures(9).fit(source)(source.images))


def test_more_patches_than_samples() -> None:
    f = PatchFeatures(2500, 2).fit(textures(2))
    assert f.filters is not None
    assert f.filters.shape == (2500, 3, 2, 2)


def test_state_dict_holds_everything() -> None:
    images = textures(20)
    f = PatchFeatures(9, 4, threshold=0.1, seed=5).fit(images)
    assert f.options() == {"patches": 9, "patch_size": 4, "threshold": 0.1, "seed": 5}
    file = io.BytesIO()
    torch.save(f.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), load(save(f.state_dict())), copy.deepcopy(f).state_dict()):
        fresh = PatchFeatures(**f.options())
        assert fresh.out_features == f.out_features
        assert repr(fresh) == repr(f)
        assert not fresh.state_dict()
        fresh.load_state_dict(state)
        assert torch.equal(fresh(images), f(images))
    model = nn.Sequential(f, nn.Linear(f.out_features, 2))
    other = nn.Sequential(PatchFeatures(**f.options()), nn.Linear(f.out_features, 2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    f.load_state_dict(PatchFeatures(9, 4, seed=6).fit(images).state_dict())
    assert not torch.equal(f(images), fresh(images))
    with pytest.raises(RuntimeError, match=r"come from patches=9 and patch_size=4, but this module has patches=9 and"):
        PatchFeatures(9, 5).load_state_dict(f.state_dict())


def test_images_without_contrast() -> None:
    flat = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 10, 10)
    f = PatchFeatures(9).fit(flat)
    assert not f(flat).any()
    f = PatchFeatures(9).fit(textures(20))
    out = f(flat)
    assert out.isfinite().all()
    torch.testing.assert_close(out, out[:1].expand_as(out))
    # What does not reach the threshold is 0, not what rounding leaves of it.
    assert not PatchFeatures(9, threshold=100.0).fit(textures(20))(textures(20)).any()
    assert (f(textures(20)) >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": 0}, "patches is at least 1, got 0"),
        ({"patch_size": 0}, "patch_size is at least 1, got 0"),
        ({"pool": -1}, "pool is at least 1, got -1"),
        ({"threshold": -0.1}, "threshold is a number ≥ 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold is a number ≥ 0, got nan"),
        ({"contrast": 0.0}, "contrast is a positive number, got 0.0"),
        ({"whitening": float("inf")}, "whitening is a positive number, got inf"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchFeatures(**options)


def test_bad_images() -> None:
    f = PatchFeatures(9)
    images = textures(5)
    with pytest.raises(RuntimeError, match=r"nothing has been learned: call fit\(images\)"):
        f(images)
    with pytest.raises(ValueError, match="from at least 2 images, got 1"):
        f.fit(images[:1])
    with pytest.raises(ValueError, match=r"images have shape \(n, C, H, W\), got \(5, 432\)"):
        f.fit(images.flatten(1))
    for apply in (f.fit, f.fit(images)):
        with pytest.raises(TypeError, match=r"uint8 pixels of 0 … 255, got torch.float32: .* \(x \* 255\)"):
            apply(images / 255)
        with pytest.raises(
            ValueError, match=r"patch_size=6 and pool=2 need images of 7 × 7 .* got shape \(5, 3, 6, 12"
        ):
            apply(images[:, :, :6])
        assert apply(images[:, :, :7]) is not None
    with pytest.raises(ValueError, match="the patches have 3 channels, but the images 1"):
        f(images[:, :1])


@pytest.mark.slow
@pytest.mark.skipif(CIFAR10 is None, reason="needs TORCHLIN_CIFAR10_FOLDER")
def test_patches_of_cifar10_tell_its_classes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = ImageFolderDataModule(Path(str(CIFAR10)), val_fraction=0)
    data.prepare_data()
    data.setup()
    images, target = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    order = torch.randperm(len(images))
    train, test = order[:8000], order[8000:]
    f = PatchFeatures(100).fit(images[train])
    solution = solve(f(images[train]), target[train], "softmax", L2(0.003), tol=1e-2)
    pixels = solve(images[train], target[train], "softmax", L2(0.03), tol=1e-2)
    accuracies = [
        float((head.predict(x) == target[test]).double().mean())
        for head, x in ((solution.to_head(), f(images[test])), (pixels.to_head(), images[test]))
    ]
    assert accuracies[0] > 0.6 > 0.4 > accuracies[1]
