"""torchlin's solvers on large data, beside what was promised of them.

    python scripts/bench_large.py [pass path hinge wide mapped] [--root FOLDER] [--threads N]

pass    one product with the weights and one with the score gradients of 50,000 CIFAR-10 images, beside `nn.Linear` and
        `F.cross_entropy` forward and backward in float32, and the error beside float64
path    30 strengths of L2 from 1 to 1e-6, softmax, CIFAR-10, each certified to 1e-4
hinge   the hinge losses, L2(1e-3), CIFAR-10, to 1e-3
wide    60 generated photographs of 337×600×3, 606,600 features, softmax, L2(1e-3), to 1e-6
mapped  500,000 × 2,048 float32 features in a file of 4 GB, softmax, L2(1e-3), to 1e-3; the memory is that
        of the process beyond the imports, without the pages of the file

FOLDER holds CIFAR-10 as images, train/ with one folder per class; pass, path and hinge need it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cifar10 import train_pixels
from torch import Tensor
from torch.nn import functional as F

from torchlin import L2, FeatureMatrix, Solution, solve, solve_path
from torchlin.integers import int8_products

Row = tuple[str, str, str]


def anonymous_memory() -> int:
    """Bytes of this process that are its own: mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class Peak:
    """The largest anonymous memory while the block runs, above that at its beginning, in MB."""

    def __enter__(self) -> Peak:
        self.before = self.largest = anonymous_memory()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.largest = max(self.largest, anonymous_memory())
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def megabytes(self) -> float:
        return (self.largest - self.before) / 1e6


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_pass(x: Tensor, y: Tensor) -> Iterator[Row]:
    features = FeatureMatrix.of(x)
    generator = torch.Generator().manual_seed(0)
    k = int(y.max()) + 1
    w = torch.randn(k, x.shape[1], generator=generator, dtype=torch.float64)
    g = torch.randn(len(x), k, generator=generator, dtype=torch.float64)
    ready = x.float() / 255
    layer = torch.nn.Linear(x.shape[1], k)

    def ours() -> None:
        features.scores(w)
        features.gradient(g)

    def theirs() -> None:
        F.cross_entropy(layer(ready), y).backward()

    rounds = [(seconds_of(ours), seconds_of(theirs)) for _ in range(8)][1:]
    ratio = statistics.median(a / b for a, b in rounds)
    seconds = statistics.median(a for a, _ in rounds)
    kind = "int8" if int8_products("cpu") else "float64"
    yield f"one pass ({kind} products) / nn.Linear and cross_entropy, {seconds:.3f} s", f"{ratio:.2f}", "≤ 0.4 on VNNI"
    some = slice(0, 5000)
    exact = features.rows(some).double()
    part = FeatureMatrix.of(x[some])
    inside = part.rows(slice(0, 5000)).double()
    errors = (
        (features.scores(w)[some] - exact @ w.T).norm() / (exact @ w.T).norm(),
        (part.gradient(g[some])[:, :-1] - g[some].T @ inside).norm() / (g[some].T @ inside).norm(),
    )
    yield "its relative error (Frobenius)", f"{max(float(e) for e in errors):.1e}", "≤ 1e-6"


def path(x: Tensor, y: Tensor) -> Iterator[Row]:
    found = solve_path(x, y, "softmax", L2, strengths=[10 ** (-6 * i / 29) for i in range(30)], tol=1e-4)
    yield f"path of 30 strengths, passes ({found.seconds:.0f} s)", f"{found.passes:g}", "≤ 250"
    yield "its largest certified gap", f"{max(s.gap for s in found.solutions):.1e}", "≤ 1e-4"


def hinge(x: Tensor, y: Tensor) -> Iterator[Row]:
    for name in ("hinge", "crammer_singer"):
        for strength, promised in ((1e-3, "≤ 180"), (1e-5, "")):
            s = solve(x, y, name, L2(strength), tol=1e-3, max_passes=600, on_failure="return")
            yield f"{name}, L2({strength:g}), gap {s.gap:.1e} in {s.passes:g} passes, s", f"{s.seconds:.0f}", promised


def photographs(n: int, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smooth colours, a little different for each of three classes, and noise."""
    y = torch.arange(n) % 3
    coarse = (
        torch.randn(n, shape[0], 6, 8, generator=generator)
        + 0.7 * torch.randn(3, shape[0], 6, 8, generator=generator)[y]
    )
    smooth = F.interpolate(coarse, shape[1:], mode="bilinear")
    noisy = 128 + 40 * smooth + 10 * torch.randn(n, *shape, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8), y


def wide(scale: float) -> Iterator[Row]:
    size = (3, max(8, round(337 * scale)), max(8, round(600 * scale)))
    x, y = photographs(60, size, torch.Generator().manual_seed(0))
    with Peak() as peak:
        s = solve(x, y, "softmax", L2(1e-3), tol=1e-6)
    yield f"60 × {x[0].numel():,} pixels, gap {s.gap:.1e}, s", f"{s.seconds:.1f}", "≤ 20"
    yield "the same, MB", f"{peak.megabytes:.0f}", "≤ 2000"


def mapped(scale: float) -> Iterator[Row]:
    n, p, k = max(400, round(500_000 * scale)), 2048, 10
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features"
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(k, p, generator=generator) / 8
        y = torch.arange(n) % k
        with file.open("wb") as stream:
            for block in torch.arange(n).split(20_000):
                rows = centres[y[block]] + torch.randn(len(block), p, generator=generator)
                stream.write(rows.numpy().tobytes())
        x = torch.from_file(str(file), shared=False, size=n * p, dtype=torch.float32).view(n, p)
        with Peak() as peak:
            s: Solution = solve(x, y, "softmax", L2(1e-3), tol=1e-3)
        yield (
            f"{file.stat().st_size / 1e9:.1f} GB mapped, gap {s.gap:.1e}, {s.seconds:.0f} s: MB",
            (f"{peak.megabytes:.0f}"),
            "≤ 1000",
        )


def main() -> None:
    names = ["pass", "path", "hinge", "wide", "mapped"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--root")
    parser.add_argument("--scale", type=float, default=1.0, help="of the data of wide and mapped")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"unknown part {unknown.pop()!r}; known: {', '.join(names)}")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads\n\n| | measured | promised |\n|---|---|---|")
    data = train_pixels(options.root) if {"pass", "path", "hinge"} & set(options.parts) else None
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "wide": lambda: wide(options.scale), "mapped": lambda: mapped(options.scale)
    }  # fmt: skip
    if data is not None:
        parts |= {"pass": lambda: one_pass(*data), "path": lambda: path(*data), "hinge": lambda: hinge(*data)}
    for part in options.parts:
        for row in parts[part]():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
