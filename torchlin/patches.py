"""Features learned from images alone, as responses to whitened patches: no labels, no gradients, no downloads."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from torchlin.integers import _seconds
from torchlin.machine import on_threads
from torchlin.registry import options_of

# What is learned from: so many patches, of so many images at most.
_SAMPLES, _IMAGES = 100_000, 10_000
# So many bytes of pixels are gathered at a time for that.
_GATHERED = 1 << 26
# So many bytes of patches, and of responses for each thread, are made at a time. On a CPU they never leave its cache.
_CPU_BYTES, _GPU_BYTES = 3 << 19, 1 << 28


class Images(Protocol):
    """Images, of which a tensor is one kind: uint8 (n, C, H, W), in memory or decoded when asked for."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """The images `index`, int64 (b,), in this order; `dim` is 0."""


class PatchFeatures(nn.Module):
    """How strongly each part of an image resembles patches of the training images: a backbone for a linear head.

    A patch x, C·s·s pixels of 0 … 255, is freed of its brightness, contrast and correlations,

        x̂ = (x − mean x) / √(var x + c),      w = P (x̂ − m),      P = U (Λ + ε)^(−½) Uᵀ

    with m and UΛUᵀ the mean and covariance of x̂ over the training images, and compared with K patches drawn from them,
    d_j = w_j/‖w_j‖. What exceeds a threshold counts, in either direction, on average over the positions of the patch in
    each of pool × pool regions of the image, those of `F.adaptive_avg_pool2d`:

        r_j = d_jᵀ w,      features  mean max(0, r_j − α)  and  mean max(0, −r_j − α)

    After x̂ everything up to the threshold is linear, and `fit` folds it into one matrix and one offset: P = Pᵀ, so

        r_j = (P d_j)ᵀ (x̂ − m) = a_jᵀ x̂ − b_j,      a_j = P d_j,      b_j = a_jᵀ m

    and all responses at all positions are one product with a_1 … a_K. With S = sign(r) max(0, |r| − α) the two features
    are (mean |S| ± mean S)/2.

    Args:
        patches: K.
        patch_size: s, in pixels.
        pool: how many regions each way. Images may differ in size, but not in their number of channels.
        threshold: α ≥ 0; r_j has a standard deviation of about 0.7.
        contrast: c > 0, in squares of pixel values: a patch that varies less than √c counts as nearly flat.
        whitening: ε > 0, in units of the variance of x̂, which is about 1.
        flip: an image and its mirror image get the same features, the averages over both. Worth twice as many patches
            where mirror images show the same things, as photographs do and digits and letters do not; the products take
            no longer (`_halves`).
        seed: which patches are drawn.

    Input is uint8 (b, C, H, W). Output is (b, out_features), in the order (pool, pool, 2, K): row and column of the
    region, positive and negative part, patch; float32, or the precision of the filters. The features of an image do not
    depend on the rest of its batch. They are about as large as patches like theirs are frequent: standardise them
    before a penalised fit, as `solve` does.

    Products are formed in bfloat16 where that takes clearly less time (`bfloat16_products`), which changes a response
    by less than 1 % of its usual size, and otherwise in the precision of the filters.

    Attributes:
        out_features: 2·K·pool².
        filters, offset: a_j, (K, C, s, s), and b_j, (K,): buffers where the images are, None before `fit` or
            `load_state_dict`.

    Raises:
        ValueError: an option out of its range.

    Reference: Coates, Ng & Lee, AISTATS 2011; Coates & Ng, ICML 2011; Thiry et al., ICLR 2021 (arXiv 2101.07528).
    """

    name = "patches"
    filters: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        patches: int = 1600,
        patch_size: int = 6,
        pool: int = 2,
        threshold: float = 0.25,
        contrast: float = 400.0,
        whitening: float = 0.1,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for option, count in (("patches", patches), ("patch_size", patch_size), ("pool", pool)):
            if count < 1:
                raise ValueError(f"{option} is at least 1, got {count}")
        for option, number in (("contrast", contrast), ("whitening", whitening)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{option} is a positive number, got {number}")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold is a number ≥ 0, got {threshold}")
        self.patches, self.patch_size, self.pool = patches, patch_size, pool
        self.threshold, self.contrast, self.whitening = threshold, contrast, whitening
        self.flip, self.seed = flip, seed
        self.register_buffer("filters", None)
        self.register_buffer("offset", None)
        nn.Module.register_load_state_dict_pre_hook(self, _make_room)

    @property
    def out_features(self) -> int:
        return 2 * self.patches * self.pool**2

    def options(self) -> dict[str, Any]:
        """The arguments that are not at their defaults: `PatchFeatures(**options)` is a module that loads this one."""
        return options_of(self)

    @torch.no_grad()
    def fit(self, images: Images) -> Self:
        """Learn m, P and the patches d_j from images, uint8 (n, C, H, W), of which 10,000 are looked at.

        The result depends on the images, the options and the seed alone. It replaces what was learned before.

        Raises:
            TypeError: images that are not uint8.
            ValueError: fewer than 2 images, or too small ones.
        """
        self._check(images)
        if images.shape[0] < 2:
            raise ValueError(f"patches are learned from at least 2 images, got {images.shape[0]}")
        generator = torch.Generator().manual_seed(self.seed)
        sampled = _normalised(self._sample(images, generator).flatten(1), self.contrast)
        mean = sampled.mean(0)
        sampled -= mean
        values, vectors = torch.linalg.eigh(sampled.T @ sampled / len(sampled))
        # Rounding may leave a variance of 0 negative.
        whiten = vectors * (values.clamp(min=0) + self.whitening).rsqrt() @ vectors.T
        chosen = sampled[torch.randperm(len(sampled), generator=generator)[: self.patches]] @ whiten
        # A patch that is the mean has no direction, and no response.
        directions = chosen / chosen.norm(dim=1, keepdim=True).clamp(min=1e-6)
        folded = directions @ whiten
        shape = (self.patches, images.shape[1], self.patch_size, self.patch_size)
        self.filters = folded.view(shape).to(images.device, torch.float32)
        self.offset = (folded @ mean).to(images.device, torch.float32)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The features of images: uint8 (b, C, H, W) → (b, out_features) in the precision of the filters.

        Raises:
            RuntimeError: nothing has been learned.
            TypeError: images that are not uint8.
            ValueError: another number of channels than in `fit`, or images that are too small.
        """
        if self.filters is None or self.offset is None:
            raise RuntimeError("nothing has been learned: call fit(images) or load_state_dict(...) first")
        self._check(images)
        channels, size = self.filters.shape[1:3]
        if images.shape[1] != channels:
            raise ValueError(f"the patches have {channels} channels, but the images {images.shape[1]}")
        half = self.filters.dtype == torch.float32 and bfloat16_products(self.filters.device.type)
        kind = torch.bfloat16 if half else self.filters.dtype
        columns = self._parts(self.filters.flatten(1).unsqueeze(2))
        responses = _Responses([part.squeeze(2).T.to(kind) for part in columns], self.offset.to(kind), self.threshold)
        spans = [_regions(length, size, self.pool) for length in images.shape[2:]]
        out = self.filters.new_zeros(len(images), self.pool, self.pool, 2, self.patches)
        numbers = images.shape[1:].numel() * size**2 // self.pool**2  # in the patches of one region
        together = max(1, _limit(images.device) // (numbers * out.element_size()))
        for block, features in zip(images.split(together), out.split(together), strict=True):
            pixels = block.to(out.dtype)
            for (i, y), (j, x) in itertools.product(*map(enumerate, spans)):
                patches = _normalised(_unfolded(pixels[:, :, y, x], size), self.contrast)
                sums = responses.sums([part.to(kind) for part in self._parts(patches)])
                # What is on the left in an image is on the right in its mirror image.
                for column, part in zip((j, -1 - j), sums, strict=False):
                    features[:, i, column].add_(part, alpha=1 / (2 * len(sums) * patches.shape[2]))
        return out.flatten(1)

    def _parts(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Patches or filters (b, C·s·s, …) as they are multiplied: as they are, or in halves."""
        return _halves(patches, self.patch_size) if self.flip else (patches,)

    def extra_repr(self) -> str:
        return ", ".join(f"{option}={value}" for option, value in self.options().items())

    def _check(self, images: Images) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images are uint8 pixels of 0 … 255, got {images.dtype}: "
                "numbers of 0 … 1 become pixels with (x * 255).round().to(torch.uint8)"
            )
        if len(images.shape) != 4:
            raise ValueError(f"images have shape (n, C, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        needed = self.patch_size + self.pool - 1
        if images.shape[1] < 1 or min(height, width) < needed:
            raise ValueError(
                f"patch_size={self.patch_size} and pool={self.pool} need images of {needed} × {needed} pixels at "
                f"least, got shape {tuple(images.shape)}: use larger images, or a smaller patch_size or pool"
            )

    def _sample(self, images: Images, generator: torch.Generator) -> Tensor:
        """Patches at random places, in float64 on the CPU: at least K of them, (N, C, s, s)."""
        n, channels, height, width = images.shape
        count = max(_SAMPLES, self.patches)
        rows = torch.randperm(n, generator=generator)[:_IMAGES].sort().values
        which = torch.arange(count) * len(rows) // count
        top = torch.randint(height - self.patch_size + 1, (count,), generator=generator)
        left = torch.randint(width - self.patch_size + 1, (count,), generator=generator)
        within = torch.arange(self.patch_size)
        c = torch.arange(channels).view(-1, 1, 1)
        y = top.view(-1, 1, 1, 1) + within.view(-1, 1)
        x = left.view(-1, 1, 1, 1) + within
        out = torch.empty(count, channels, self.patch_size, self.patch_size, dtype=torch.float64)
        step = max(1, _GATHERED // (channels * height * width))
        for start in range(0, len(rows), step):
            some = images.index_select(0, rows[start : start + step].to(images.device)).cpu()
            taken = (which >= start) & (which < start + step)
            out[taken] = some[(which[taken] - start).view(-1, 1, 1, 1), c, y[taken], x[taken]].double()
        return out


class _Responses:
    """What of r_j = a_jᵀ x̂ − b_j exceeds the threshold, in blocks that are small enough for a cache.

    Args:
        filters: a_1 … a_K as columns, (C·s·s, K); or their halves, for the features of an image and its mirror image.
        offset: b_j, (K,). threshold: α.
    """

    def __init__(self, filters: Sequence[Tensor], offset: Tensor, threshold: float) -> None:
        self.filters, self.offset, self.threshold = filters, -offset, threshold
        numbers = _limit(offset.device) // offset.element_size()
        threads = torch.get_num_threads() if offset.device.type == "cpu" else 1
        # So many positions of an image at a time, whatever else is multiplied with it.
        self.positions = max(1, numbers // len(offset))
        # New memory would cost as much as the product.
        self.room = offset.new_empty(1 + len(filters), max(numbers * threads, len(offset)))

    def sums(self, patches: Sequence[Tensor]) -> Tensor:
        """Σ |S| + Σ S and Σ |S| − Σ S over all positions, twice the sums of either sign, from x̂ or its halves.

        Args:
            patches: (b, C·s·s, positions), as many as there are filters.

        Returns:
            float32 (float64 for float64), (1, b, 2, K); with halves (2, b, 2, K), the second of the mirror images.
        """
        count, (b, _, positions) = len(self.offset), patches[0].shape
        step = min(positions, self.positions)
        together = max(1, self.room.shape[1] // (step * count))
        kind = torch.promote_types(self.offset.dtype, torch.float32)
        out = self.offset.new_zeros(len(self.filters), b, 2, count, dtype=kind)
        for image, position in itertools.product(range(0, b, together), range(0, positions, step)):
            block = slice(image, image + together)
            even, *odd = (part[block, :, position : position + step].mT for part in patches)
            n, m, _ = even.shape
            *responses, spare = self.room[:, : n * m * count].view(-1, n, m, count)
            # One product an image, so that its features are the same in every batch.
            torch.baddbmm(self.offset, even, self.filters[0].expand(n, -1, -1), out=responses[0])
            if odd:
                torch.bmm(odd[0], self.filters[1].expand(n, -1, -1), out=spare)
                torch.sub(responses[0], spare, out=responses[1])
                responses[0] += spare
            for r, features in zip(responses, out, strict=True):
                torch.clamp(r, -self.threshold, self.threshold, out=spare)
                signed = r.sub_(spare).sum(1, dtype=kind)
                total = r.abs_().sum(1, dtype=kind)
                features[block] += torch.stack((total + signed, total - signed), 1)
        return out


def _limit(device: torch.device) -> int:
    return _CPU_BYTES if device.type == "cpu" else _GPU_BYTES


@functools.cache
def bfloat16_products(device: str) -> bool:
    """Whether products of bfloat16 take clearly less time than those of float32 here, found out at first use."""
    # More would take long where they are emulated; less would only measure how long a GPU takes to start.
    size = 64 if device == "cpu" else 8192
    patches, filters = torch.ones(size, 128, device=device), torch.ones(128, 512, device=device)
    half_patches, half_filters = patches.bfloat16(), filters.bfloat16()
    try:
        with on_threads(1):
            # An entry is waited for: a GPU returns before it has multiplied.
            half = _seconds(lambda: (half_patches @ half_filters)[0, 0].cpu())
            return half < 0.8 * _seconds(lambda: (patches @ filters)[0, 0].cpu())
    except RuntimeError:
        return False


def _halves(patches: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The symmetric and the antisymmetric part (u, v) of patches (b, C·s·s, …) under exchange of left and right.

    In an orthonormal basis, so that a·x = a_u·u + a_v·v, and a_u·u − a_v·v with the mirror image of x: both in the
    time of one.
    """
    columns = patches.unflatten(1, (-1, size))
    left, right = (part[:, :, : (size + 1) // 2] for part in (columns, columns.flip(2)))
    even, odd = (left + right) * math.sqrt(0.5), (left - right)[:, :, : size // 2] * math.sqrt(0.5)
    if size % 2:
        even[:, :, -1] *= math.sqrt(0.5)  # the middle column, which is its own mirror image
    return even.flatten(1, 2), odd.flatten(1, 2)


def _regions(size: int, patch_size: int, pool: int) -> list[slice]:
    """The pixels along one side that the patches of each region cover; the same from either end."""
    count = size - patch_size + 1
    return [slice(i * count // pool, -(-(i + 1) * count // pool) + patch_size - 1) for i in range(pool)]


def _unfolded(pixels: Tensor, size: int) -> Tensor:
    """The patches of images (b, C, H, W) as columns, (b, C·s·s, positions).

    `F.unfold` gives the same in three times the time.
    """
    windows = pixels.unfold(2, size, 1).unfold(3, size, 1).permute(0, 1, 4, 5, 2, 3)
    return windows.reshape(len(pixels), windows.shape[1:4].numel(), windows.shape[4:].numel())


def _normalised(patches: Tensor, contrast: float) -> Tensor:
    """(x − mean x)/√(var x + c) along dimension 1."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred.mul_(centred.square().mean(1, keepdim=True).add_(contrast).rsqrt_())


def _make_room(
    module: PatchFeatures,
    state: Mapping[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before loading: buffers for what is loaded, whose size depends on the number of channels."""
    filters, offset = (state.get(prefix + buffer) for buffer in ("filters", "offset"))
    if filters is None or offset is None or module.filters is not None:
        return
    size = module.patch_size
    if filters.shape[0] != module.patches or filters.shape[2:] != (size, size):
        errors.append(
            f"the filters come from patches={filters.shape[0]} and patch_size={filters.shape[-1]}, but this module has "
            f"patches={module.patches} and patch_size={size}: make it with the same options"
        )
    module.filters, module.offset = torch.empty_like(filters), torch.empty_like(offset)
