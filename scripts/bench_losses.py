"""Forward + backward of torchlin's losses beside PyTorch's, in one run: medians, ratios and peak memory.

    python scripts/bench_losses.py [--threads 2] [--repeats 30] [--device cpu]

The two sides take turns, so that a machine whose speed drifts treats both alike. Peak memory is what one forward +
backward needs beyond the scores, measured in a fresh process for each side: on a GPU by the allocator's own count, on
Linux by the kernel's high-water mark; elsewhere it is left out.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import torchlin.functional as L

Call = Callable[[Tensor, Tensor], Tensor]
SIZES = ((128, 10), (4096, 1000), (1024, 32768))
# What the project promises, as a ratio of times; None where there is no promise.
TARGETS = {
    ("softmax", 4096): 1.15,
    ("softmax", 1024): 1.05,
    ("hinge", 4096): 0.5,
    ("hinge", 1024): 0.6,
    ("squared_hinge", 4096): 0.5,
    ("squared_hinge", 1024): 0.6,
}


def pair(name: str, k: int) -> tuple[Call, Call, str]:
    """(torchlin's function, PyTorch's expression of the same loss, how PyTorch's is called)."""
    ours: Call = getattr(L, f"{name}_loss")
    theirs: dict[str, tuple[Call, str]] = {
        "softmax": (F.cross_entropy, "cross_entropy"),
        "hinge": (lambda z, y: k * F.multi_margin_loss(z, y), "k · multi_margin_loss"),
        "squared_hinge": (lambda z, y: k * F.multi_margin_loss(z, y, p=2), "k · multi_margin_loss(p=2)"),
    }
    return ours, *theirs[name]


def inputs(n: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.empty(n, k, device=device).normal_(0, 2, generator=generator).requires_grad_()
    return scores, torch.randint(k, (n,), device=device, generator=generator)


def step(loss: Call, scores: Tensor, target: Tensor) -> None:
    scores.grad = None
    loss(scores, target).backward()


def median_times(calls: list[Call], scores: Tensor, target: Tensor, repeats: int, device: str) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            step(call, scores, target)
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 3:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def peak_here(name: str, side: str, n: int, k: int, device: str) -> float:
    """MiB above what was held when the scores were made. For a fresh process."""
    scores, target = inputs(n, k, device)
    call = pair(name, k)[0 if side == "torchlin" else 1]
    step(call, *inputs(8, 8, device))  # load what the first call loads
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(call, scores, target)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    before = high_water_mark()
    step(call, scores, target)
    return (high_water_mark() - before) / 2**10


def high_water_mark() -> int:
    """KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def peak(name: str, side: str, n: int, k: int, options: argparse.Namespace) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", name, side, str(n), str(k)]
    command += ["--threads", str(options.threads), "--device", options.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="*", help="n k n k …: other sizes than the standard three")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, side, n, k = options.peak
        print(peak_here(name, side, int(n), int(k), options.device))
        return
    countable = options.device != "cpu" or Path("/proc/self/clear_refs").exists()
    sizes = list(zip(options.sizes[::2], options.sizes[1::2], strict=True)) if options.sizes else list(SIZES)
    place = (
        torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()}, {options.threads} threads"
    )
    print(f"torch {torch.__version__}, {place}, float32, forward + backward, medians of {options.repeats}\n")
    print("| loss | PyTorch | n × k | torchlin ms | PyTorch ms | ratio | promised | torchlin MiB | PyTorch MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("softmax", "hinge", "squared_hinge"):
        for n, k in sizes:
            ours, theirs, called = pair(name, k)
            repeats = options.repeats * (20 if n * k < 100_000 else 1)
            mine, other = median_times([ours, theirs], *inputs(n, k, options.device), repeats, options.device)
            skipped = not countable or n * k < 1_000_000  # too small to see in a process's peak
            memory = ["–", "–"] if skipped else [f"{peak(name, s, n, k, options):.0f}" for s in ("torchlin", "torch")]
            promised = TARGETS.get((name, n))
            promise = f"≤ {promised}" if promised else ("≤ 0.2 ms" if n == 128 else "–")
            print(
                f"| {name} | {called} | {n} × {k} | {mine * 1e3:.3f} | {other * 1e3:.3f} | {mine / other:.2f} | "
                f"{promise} | {memory[0]} | {memory[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
