"""Products of int8 data with real numbers, exact but for one rounding of the numbers.

A byte minus 128 is an int8 v, exactly. The other factor, a weight or a score gradient, is rounded once to 30-bit
integers q (per class, relative to the largest), and V = Σ v q is then computed without any rounding, either as four
products with the bytes of q on int8 hardware or as one in float64: with |v| ≤ 2⁷, |q| ≤ 2²⁹ and at most 2¹⁶ terms every
partial sum stays below 2⁵³. The two ways agree in every bit, so the result does not depend on the machine or on the
number of threads.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from torchlin.machine import on_threads

# int32 sums of products of int8 hold 131,071 terms at most.
TERMS = 1 << 16
# |q| ≤ 2²⁹ leaves room for the carries of the four bytes.
_LARGEST = float(1 << 29)
# Adding this and flipping the same bits turns the bytes of an int32 into signed digits: q = Σ digit_i 256^i.
_DIGITS = 0x00808080
# What lies between two products is handled in blocks of this many samples, which stay in a cache.
_ROWS = 4096


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers q and units u with x ≈ q u for x (k, t): |q| ≤ 2²⁹ in int32, and one unit per row, (k,)."""
    largest = x.abs().amax(1)
    unit = torch.where(largest > 0, largest / _LARGEST, 1.0)
    out = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _ROWS):
        block = slice(start, start + _ROWS)
        out[:, block] = (x[:, block] / unit.unsqueeze(1)).round_()
    return out, unit


def _digits(q: Tensor) -> Tensor:
    """The four signed digits of int32 numbers to the base 256, the lowest first: (…, k) → (…, 4k) in int8."""
    # Not `contiguous()`, which keeps the strides of a single column.
    digits = torch.bitwise_xor(q + _DIGITS, _DIGITS).clone(memory_format=torch.contiguous_format)
    return digits.view(torch.int8)


def exact_product(v: Tensor, q: Tensor, limbs: bool, threads: int | None = None, wide: Tensor | None = None) -> Tensor:
    """Σ v q, (k, m) in float64, from v (m, t) in int8 and q (k, t) in int32: integers below 2⁵³, exactly.

    Args:
        limbs: by the bytes of q on int8 hardware, otherwise in float64.
        threads: see `on_threads`.
        wide: room for the float64 v, at least as many numbers.
    """
    k = len(q)
    if not (limbs and int8_fits(v, 4 * k)):
        with on_threads(threads):
            if wide is None or wide.numel() < v.numel():
                return q.double() @ v.double().T
            # In the order in which the bytes lie: v may be the transpose of rows.
            flip = v.stride(0) < v.stride(1)
            plain = v.T if flip else v
            rows = wide[: v.numel()].view(plain.shape).copy_(plain)
            return q.double() @ (rows if flip else rows.T)
    digits = _digits(q.T)
    with on_threads(threads):
        product = torch._int_mm(v, digits)
    out = torch.empty(k, len(v), dtype=torch.float64, device=v.device)
    for start in range(0, len(v), _ROWS):
        block = slice(start, start + _ROWS)
        digits = product[block].T.contiguous().view(k, 4, -1)
        total = digits[:, 3].double()
        for place in (2, 1, 0):
            total.mul_(256).add_(digits[:, place])
        out[:, block] = total
    return out


def int8_fits(v: Tensor, columns: int) -> bool:
    """Whether the int8 kernel takes the product of v (m, t) with (t, columns): cuBLAS wants multiples of 8."""
    return v.device.type == "cpu" or (len(v) > 16 and len(v) % 8 == v.shape[1] % 8 == columns % 8 == 0)


@functools.cache
def int8_products(device: str) -> bool:
    """Whether int8 products are exact and fast here, found out at first use.

    On some processors they are emulated with saturating 16-bit sums, on some they are slower than float64.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(-128, 128, (2048, 512), generator=generator, dtype=torch.int8)
    v[:4] = torch.tensor([127, -128, 127, -128], dtype=torch.int8).unsqueeze(1)
    q = torch.randint(-(1 << 29), 1 << 29, (8, 512), generator=generator, dtype=torch.int32)
    q[0], q[1] = 0x1F7F7F7F, -0x1F808080
    v, q = v.to(device), q.to(device)
    try:
        expected = q.double() @ v.double().T
        if not torch.equal(exact_product(v, q, True), expected):
            return False
        other = (v[:, :8].int() * 4194303).T.contiguous()
        if not torch.equal(exact_product(v.T, other, True), other.double() @ v.double()):
            return False
        # At full size memory traffic is on the side of int8, so only a kernel that is clearly slow is left out.
        return _seconds(lambda: exact_product(v, q, True)) < 2 * _seconds(lambda: exact_product(v, q, False))
    except RuntimeError:
        return False


def _seconds(work: Callable[[], Tensor]) -> float:
    work()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
