"""How X is held and multiplied: every method speaks the standardised features X̃ = (X − μ)/σ.

Solvers and certificates need four products of X̃ and nothing else, so data of any kind (floats, pixels, sparse rows,
tensors mapped from a file) look the same to them. Everything is read in blocks of rows.

Pixels are multiplied exactly (see `torchlin.integers`); standardisation is applied to the products afterwards, with the
same rounded factor, so nothing cancels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from torchlin.heads import Standardization
from torchlin.integers import TERMS, exact_product, int8_fits, int8_products, rounded
from torchlin.machine import available_memory, on_threads

__all__ = ["DenseFeatures", "FeatureMatrix", "PixelFeatures", "SparseFeatures"]

# Bytes of a block of rows: small enough for temporaries to stay in a cache, large enough to keep the kernels busy.
_BLOCK_BYTES = 1 << 23
# A symmetric product is formed in panels of at least so many columns, of which each is multiplied with the rest only.
_PANEL = 256
# Up to this size pixels are shifted and floats standardised once, in a copy; larger ones, which may be mapped from a
# file, block by block.
_COPY_BYTES = 1 << 29


class FeatureMatrix:
    """X̃ = (X − μ)/σ, (n, p), seen through its products. Make one with `FeatureMatrix.of`.

    Attributes:
        shape: (n, p).
        standardization: μ and σ, (p,) in float64, in raw-input coordinates (pixels: of x/255).
        dtype: the floating-point type of the results.
        device: where the products are computed and returned.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    standardization: Standardization
    # Whether the products are the same in every bit for any number of threads, and how many they may then use where
    # the caller runs on one, so that nothing else depends on that number either.
    exact = False
    threads: int | None = None

    @property
    def numbers(self) -> int:
        """How many numbers a product reads."""
        return self.shape[0] * self.shape[1]

    @staticmethod
    def of(
        features: Tensor | FeatureMatrix,
        *,
        standardize: bool = True,
        weight: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FeatureMatrix:
        """The feature matrix of a tensor, by its kind.

        Args:
            features: (n, p) floating point, dense or `torch.sparse_csr`; or uint8 pixels (n, …), flattened and read as
                x/255. A tensor mapped from a file stays there and is read in blocks. A `FeatureMatrix` is returned as
                it is.
            standardize: False takes μ = 0 and σ = 1.
            weight: (n,) ≥ 0, what each sample counts in μ and σ; None is 1 each.
            dtype: float32 or float64 for the products; by default that of the features (float32 for half types) and
                float64 for pixels, which cost the same in either.
            device: where to compute; by default where the features are.

        Raises:
            TypeError: integers other than uint8, complex numbers.
            ValueError: not one row per sample, no samples or no features, NaN or infinite entries (names the first
                row).
        """
        if isinstance(features, FeatureMatrix):
            return features
        where = torch.device(device) if device is not None else features.device
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype is torch.float32 or torch.float64, got {dtype}")
        if features.dim() < 2 or 0 in features.shape:
            raise ValueError(f"features are rows, (n, p) with n and p at least 1, got shape {tuple(features.shape)}")
        if features.layout == torch.sparse_csr:
            return SparseFeatures(features, standardize, weight, dtype, where)
        if features.layout != torch.strided:
            raise TypeError(f"sparse features come as torch.sparse_csr, got {features.layout}: use .to_sparse_csr()")
        if features.dtype == torch.uint8:
            return PixelFeatures(features.flatten(1), standardize, weight, dtype, where)
        if features.dim() != 2:
            raise ValueError(f"features are rows, (n, p), got shape {tuple(features.shape)}: use features.flatten(1)")
        if not features.is_floating_point():
            raise TypeError(f"features are floating point, or uint8 pixels, got {features.dtype}: use features.float()")
        return DenseFeatures(features, standardize, weight, dtype, where)

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Z = X̃ Wᵀ + b, (n, k), from W (k, p) and b (k,); in memory class after class, as sums over classes like it."""
        raise NotImplementedError

    def gradient(self, score_gradient: Tensor) -> Tensor:
        """Gᵀ [X̃ 1], (k, p + 1), from G (n, k): the weight gradient and, last, the bias gradient."""
        raise NotImplementedError

    def gram(self, weight: Tensor | None = None) -> Tensor:
        """X̃ᵀ diag(s) X̃, (p, p), in `dtype`, from s (n,); None is 1 each."""
        p = self.shape[1]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for block in self.blocks():
            rows = self.rows(block)
            _add_square(out, rows if weight is None else rows * weight[block].to(rows).sqrt().unsqueeze(1))
        return _mirrored(out)

    def kernel(self) -> Tensor:
        """X̃ X̃ᵀ, (n, n)."""
        n = self.shape[0]
        out = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for block in self.blocks():
            out[:, block] = self.scores(self.rows(block))
        return out

    def rows(self, index: Tensor | slice) -> Tensor:
        """The standardised rows of an index, (m, p)."""
        raise NotImplementedError

    def columns(self, index: Tensor) -> Tensor:
        """The standardised columns of an index, (n, m)."""
        out = torch.empty(self.shape[0], len(index), dtype=self.dtype, device=self.device)
        for block in self.blocks():
            out[block] = self.rows(block)[:, index]
        return out

    def double(self) -> FeatureMatrix:
        """The same features with products in float64."""
        if self.dtype == torch.float64:
            return self
        other = copy.copy(self)
        other._set_dtype(torch.float64)
        return other

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def blocks(self) -> Iterator[slice]:
        """All rows, in fixed blocks."""
        n, p = self.shape
        step = max(1, min(TERMS, _BLOCK_BYTES // (p * self._itemsize())))
        for start in range(0, n, step):
            yield slice(start, min(n, start + step))

    def _itemsize(self) -> int:
        return self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class _InBlocks(FeatureMatrix):
    """The products from standardised blocks of rows."""

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = weight.to(self.device, self.dtype)
        out = torch.empty(len(weight), self.shape[0], dtype=self.dtype, device=self.device)
        for block in self.blocks():
            out[:, block] = weight @ self.rows(block).T
        return out.T if bias is None else out.T.add_(bias.to(out))

    def gradient(self, score_gradient: Tensor) -> Tensor:
        g = score_gradient.to(self.device, self.dtype)
        out = torch.zeros(g.shape[1], self.shape[1] + 1, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            out[:, :-1] += g[block].T @ self.rows(block)
        out[:, -1] = g.sum(0, dtype=torch.float64)
        return out.to(self.dtype)

    def kernel(self) -> Tensor:
        n = self.shape[0]
        out = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for i in self.blocks():
            rows = self.rows(i)
            for j in self.blocks():
                if j.start <= i.start:
                    products = rows @ self.rows(j).T
                    out[i, j], out[j, i] = products, products.T
        return out


class DenseFeatures(_InBlocks):
    """Floating-point rows: float32, float64 or half types, in memory or mapped from a file."""

    def __init__(
        self,
        features: Tensor,
        standardize: bool,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        natural = features.dtype if features.dtype in (torch.float32, torch.float64) else torch.float32
        self.features = features.detach()
        self.shape = (features.shape[0], features.shape[1])
        self.dtype, self.device = dtype or natural, device
        mean, std = self._moments(weight)
        identity = Standardization(torch.zeros_like(mean), torch.ones_like(std))
        self.standardization = Standardization(mean, std) if standardize else identity
        self._plain = not standardize
        self._set_dtype(self.dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._mean, self._std = (t.to(dtype) for t in self.standardization)
        self._ready: Tensor | None = None
        size = dtype.itemsize * self.features.numel()
        if size <= min(_COPY_BYTES, available_memory(self.device) // 8):
            # Every product would standardise them anew, which takes longer than the product.
            self._ready = self._standardized(slice(0, self.shape[0]))

    def _moments(self, weight: Tensor | None) -> Standardization:
        p = self.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.zeros(2, p, dtype=torch.float64, device=self.device)
        origin = self._raw(slice(0, 1)).double()[0]
        for block in self.blocks():
            rows = self._raw(block)
            if not bool(rows.isfinite().all()):
                row = block.start + int((~rows.isfinite()).any(1).nonzero()[0])
                raise ValueError(f"features are finite, but row {row} has a NaN or infinite entry")
            # Differences to a row of the data: a mean far from 0 would take the digits of the variance with it.
            shifted = rows.double() - origin
            s = shifted.new_ones(len(shifted)) if weight is None else weight[block].to(shifted)
            total += s.sum()
            sums[0] += s @ shifted
            sums[1] += s @ shifted.square_()
        return _moments_of(total, sums, origin, 1.0)

    def _raw(self, index: Tensor | slice) -> Tensor:
        return self.features[index].to(self.device)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self._standardized(index) if self._ready is None else self._ready[index]

    def _standardized(self, index: Tensor | slice) -> Tensor:
        rows = self._raw(index).to(self.dtype)
        return rows if self._plain else (rows - self._mean).div_(self._std)


class PixelFeatures(FeatureMatrix):
    """uint8 rows, multiplied exactly. Scores and gradients are float64 by default: they cost the same."""

    exact = True

    def __init__(
        self,
        features: Tensor,
        standardize: bool,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.shape = (features.shape[0], features.shape[1])
        self.dtype, self.device = dtype or torch.float64, device
        self._limbs = int8_products(device.type)
        self._scratch = torch.empty(0, dtype=torch.int8, device=device)
        self._wide = torch.empty(0, dtype=torch.float64, device=device)
        # The bytes as they came, or, where there is room for a copy, already shifted.
        self._bytes, self._own = features, False
        if features.numel() <= min(_COPY_BYTES, available_memory(device) // 4):
            self._bytes, self._own = self._shifted(slice(0, self.shape[0])), True
            self._scratch = torch.empty(0, dtype=torch.int8, device=device)
        # μ and σ of v = x − 128, which are what the products need.
        if standardize:
            self._mean, self._std = self._moments(weight)
        else:
            ones = torch.ones(self.shape[1], dtype=torch.float64, device=device)
            self._mean, self._std = -128 * ones, 255 * ones
        self.standardization = Standardization((self._mean + 128) / 255, self._std / 255)

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = weight.to(self.device, torch.float64) / self._std
        q, unit = rounded(weight)
        q_mean = (q * self._mean).sum(1)
        n, k = self.shape[0], len(weight)
        offset = -(q_mean * unit) if bias is None else bias.to(q_mean) - q_mean * unit
        out = torch.empty(k, n, dtype=self.dtype, device=self.device)
        spans = [slice(i, i + TERMS) for i in range(0, self.shape[1], TERMS)]
        for block in self._large_blocks(k):
            v = self._shifted(block)
            total = self._product(v[:, spans[0]], q[:, spans[0]])
            for span in spans[1:]:
                total += self._product(v[:, span], q[:, span])
            torch.add(offset.unsqueeze(1), total.mul_(unit.unsqueeze(1)), out=out[:, block])
        return out.T

    def gradient(self, score_gradient: Tensor) -> Tensor:
        q, unit = rounded(score_gradient.to(self.device, torch.float64).T)
        k = len(q)
        total = torch.zeros(k, self.shape[1], dtype=torch.int64, device=self.device)
        for block in self._large_blocks(k):
            total += self._product(self._shifted(block).T, q[:, block]).long()
        ones = q.sum(1).double()
        out = torch.empty(k, self.shape[1] + 1, dtype=torch.float64, device=self.device)
        out[:, :-1] = total.double().sub_(torch.outer(ones, self._mean)).div_(self._std).mul_(unit.unsqueeze(1))
        out[:, -1] = ones * unit
        return out.to(self.dtype)

    def _product(self, v: Tensor, q: Tensor) -> Tensor:
        """`exact_product`, with room for float64 rows that is used again: new memory costs more than the product."""
        if not self._limbs and self._wide.numel() < v.numel():
            self._wide = torch.empty(v.numel(), dtype=torch.float64, device=self.device)
        return exact_product(v, q, self._limbs, self.threads, self._wide)

    def gram(self, weight: Tensor | None = None) -> Tensor:
        if weight is not None:
            return self._weighted_gram(weight)
        with on_threads(self.threads):
            return self._exact_gram()

    def _exact_gram(self) -> Tensor:
        p = self.shape[1]
        total = torch.zeros(p, p, dtype=torch.float64, device=self.device)
        sums = torch.zeros(p, dtype=torch.float64, device=self.device)
        n = self.shape[0]
        # Larger blocks than elsewhere: the (p, p) sum is added to once for each.
        step = TERMS if self._limbs else 1024
        step = max(1, min(step, (1 << 28) // p))
        for start in range(0, n, step):
            v = self._shifted(slice(start, min(n, start + step)))
            if self._limbs and int8_fits(v.T, p):
                _add_square(total, v)
            else:
                for part in v.split(1024):
                    _add_square(total, part.float())  # 2¹⁴ · 1024 = 2²⁴: exact
            sums += v.sum(0)
        _mirrored(total)
        mean = self._mean
        cross = torch.outer(sums, mean)
        total.sub_(cross).sub_(cross.T).add_(torch.outer(mean, mean), alpha=n)
        return total.div_(self._std).div_(self._std.unsqueeze(1)).to(self.dtype)

    def kernel(self) -> Tensor:
        n, p = self.shape
        total = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        step = max(1, _BLOCK_BYTES // (8 * n))
        for start in range(0, p, step):
            span = slice(start, min(p, start + step))
            v = self._shift(self._bytes[:, span]).double().sub_(self._mean[span]).div_(self._std[span])
            v = v.to(self.dtype)
            total.addmm_(v, v.T)
        return total

    def rows(self, index: Tensor | slice) -> Tensor:
        rows = self._shift(self._bytes[index]).to(self.dtype)
        return rows.sub_(self._mean.to(rows)).div_(self._std.to(rows))

    def _itemsize(self) -> int:
        return 1 if self._limbs else 8

    def _large_blocks(self, k: int) -> Iterator[slice]:
        """All rows in blocks for products with k columns: as large as they may be where they need no copy."""
        n, p = self.shape
        step = min(TERMS, max(1024, _COPY_BYTES // 16 // k))
        if not (self._own and self._limbs):
            step = max(1, min(step, _BLOCK_BYTES // (p * self._itemsize())))
        for start in range(0, n, step):
            yield slice(start, min(n, start + step))

    def _shift(self, x: Tensor) -> Tensor:
        """x − 128 as int8."""
        x = x.to(self.device)
        return x if self._own else torch.bitwise_xor(x, 128).view(torch.int8)

    def _shifted(self, block: slice) -> Tensor:
        """`_shift` of rows, in a buffer that is used again."""
        x = self._bytes[block].to(self.device)
        if self._own:
            return x
        if self._scratch.numel() < x.numel():
            self._scratch = torch.empty(x.numel(), dtype=torch.int8, device=self.device)
        out = self._scratch[: x.numel()].view(x.shape)
        torch.bitwise_xor(x, 128, out=out.view(torch.uint8))
        return out

    def _moments(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        n, p = self.shape
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.zeros(2, p, dtype=torch.float64, device=self.device)
        kind = torch.float32 if weight is None else torch.float64
        step = max(1, min(1024, _BLOCK_BYTES // (4 * p)))
        for start in range(0, n, step):
            block = slice(start, min(n, start + step))
            v = self._shifted(block).to(kind)  # in float32 sums of 1024 squares are exact
            if weight is None:
                total += len(v)
                sums[0] += v.sum(0)
                sums[1] += v.square_().sum(0)
            else:
                s = weight[block].to(v).unsqueeze(1)
                total += s.sum()
                sums[0] += (s * v).sum(0)
                sums[1] += v.square_().mul_(s).sum(0)
        mean, std = _moments_of(total, sums, torch.zeros_like(sums[0]), 255.0)
        return mean, std

    def _weighted_gram(self, weight: Tensor) -> Tensor:
        p = self.shape[1]
        total = torch.zeros(p, p, dtype=torch.float32, device=self.device)
        mean, std = self._mean.float(), self._std.float()
        root = weight.to(self.device, torch.float32).sqrt()
        for start in range(0, self.shape[0], 2048):
            block = slice(start, min(self.shape[0], start + 2048))
            _add_square(total, self._shifted(block).float().sub_(mean).div_(std).mul_(root[block].unsqueeze(1)))
        return _mirrored(total).to(self.dtype)


class SparseFeatures(FeatureMatrix):
    """CSR rows. Only the scaling touches the data; centring goes into the bias, so zeros stay unstored."""

    def __init__(
        self,
        features: Tensor,
        standardize: bool,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        if not features.is_floating_point():
            raise TypeError(f"sparse features are floating point, got {features.dtype}")
        natural = features.dtype if features.dtype in (torch.float32, torch.float64) else torch.float32
        self.shape = (features.shape[0], features.shape[1])
        self.dtype, self.device = dtype or natural, device
        self.features = features.detach().to(device=device, dtype=self.dtype)
        crow, values = self.features.crow_indices(), self.features.values()
        if not bool(values.isfinite().all()):
            at = int((~values.isfinite()).nonzero()[0])
            row = int(torch.searchsorted(crow, torch.tensor(at, device=crow.device), right=True)) - 1
            raise ValueError(f"features are finite, but row {row} has a NaN or infinite entry")
        self._set_dtype(self.dtype)
        mean = torch.zeros(self.shape[1], dtype=torch.float64, device=device)
        std = torch.ones_like(mean)
        if standardize:
            mean, std = self._moments(weight)
        self.standardization = Standardization(mean, std)

    @property
    def numbers(self) -> int:
        return self.features.values().numel()

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.features = self.features.to(dtype)
        # torch has no product with the transpose of a CSR tensor that is as fast as one with a CSR tensor.
        self._transposed = self.features.to_sparse_csc()
        self._transposed = torch.sparse_csr_tensor(
            self._transposed.ccol_indices(), self._transposed.row_indices(), self._transposed.values(),
            (self.shape[1], self.shape[0]), check_invariants=False,
        )  # fmt: skip

    def scores(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mean, std = self.standardization
        scaled = weight.to(self.device, torch.float64) / std
        offset = -(scaled @ mean) if bias is None else bias.to(scaled) - scaled @ mean
        products = self.features @ scaled.to(self.dtype).T.contiguous()
        return torch.add(products.T.contiguous(), offset.to(self.dtype).unsqueeze(1)).T

    def gradient(self, score_gradient: Tensor) -> Tensor:
        mean, std = self.standardization
        g = score_gradient.to(self.device, self.dtype)
        ones = g.sum(0, dtype=torch.float64)
        raw = (self._transposed @ g).T.double()
        scaled = (raw - torch.outer(ones, mean)) / std
        return torch.cat((scaled, ones.unsqueeze(1)), 1).to(self.dtype)

    def rows(self, index: Tensor | slice) -> Tensor:
        mean, std = (t.to(self.dtype) for t in self.standardization)
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.shape[0]), device=self.device)
        dense = torch.zeros(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        crow = self.features.crow_indices()
        counts = crow[index + 1] - crow[index]
        row = torch.repeat_interleave(torch.arange(len(index), device=self.device), counts)
        first = torch.cumsum(counts, 0) - counts
        at = torch.arange(len(row), device=self.device) - first[row] + crow[index][row]
        dense.index_put_((row, self.features.col_indices()[at]), self.features.values()[at], accumulate=True)
        return dense.sub_(mean).div_(std)

    def columns(self, index: Tensor) -> Tensor:
        n, p = self.shape
        place = torch.full((p,), -1, device=self.device)
        place[index] = torch.arange(len(index), device=self.device)
        at = place[self.features.col_indices()]
        kept = at >= 0
        row = torch.repeat_interleave(torch.arange(n, device=self.device), self.features.crow_indices().diff())
        out = torch.zeros(n, len(index), dtype=self.dtype, device=self.device)
        out.index_put_((row[kept], at[kept]), self.features.values()[kept], accumulate=True)
        mean, std = (t.to(self.dtype)[index] for t in self.standardization)
        return out.sub_(mean).div_(std)

    def _moments(self, weight: Tensor | None) -> Standardization:
        n = self.shape[0]
        s = torch.ones(n, dtype=torch.float64, device=self.device)
        s = s if weight is None else weight.to(s)
        counts = self.features.crow_indices().diff()
        column, values = self.features.col_indices(), self.features.values().double()
        share = torch.repeat_interleave(s, counts) / s.sum()
        mean = torch.zeros(self.shape[1], dtype=torch.float64, device=self.device)
        mean.index_add_(0, column, share * values)
        # Σ over the stored entries of (x − μ)², and μ² for each of the others.
        stored = torch.zeros_like(mean).index_add_(0, column, share)
        variance = torch.zeros_like(mean).index_add_(0, column, share * (values - mean[column]).square())
        variance += (1 - stored).clamp_(min=0) * mean.square()
        return Standardization(mean, _scale(variance, mean, 1.0))


def _moments_of(total: Tensor, sums: Tensor, origin: Tensor, constant: float) -> Standardization:
    """μ and σ from Σ s, Σ s(x − origin) and Σ s(x − origin)²; `constant` stands for the σ of a constant feature."""
    shift, square = sums / total
    return Standardization(origin + shift, _scale(square - shift.square(), shift, constant))


def _scale(variance: Tensor, shift: Tensor, constant: float) -> Tensor:
    # What rounding leaves of the variance of a constant feature is no scale.
    noise = 1e-14 * shift.square()
    return torch.where(variance > noise, variance.clamp(min=0).sqrt(), constant)


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the lower triangle of (p, p), and to what of the upper one is in the same panels.

    int8 rows are multiplied in int32.
    """
    p = rows.shape[1]
    multiply = torch._int_mm if rows.dtype == torch.int8 else torch.mm
    count = max(1, min(8, p // _PANEL))
    width = p // count // 8 * 8 if count > 1 else p  # cuBLAS wants multiples of 8 in int8
    for i in range(count):
        start = i * width
        span = slice(start, start + width if i < count - 1 else p)
        total[start:, span] += multiply(rows[:, start:].T, rows[:, span])


def _mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix of which `_add_square` filled the lower triangle, in place."""
    upper = total.tril(-1).T
    return total.tril_().add_(upper)
