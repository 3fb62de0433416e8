"""A sweep of 52 linear heads: steps per second of a `HeadBank` beside a Python loop over the heads, in one run.

    python scripts/bench_heads.py [--threads 2] [--rounds 9] [--steps 40]

The sweep is that of DINOv2's linear probe: 13 learning rates for each of 4 sets of cached features of width 512,
batches of 128, SGD with momentum 0.9. The loop does as DINOv2 does: 52 `nn.Linear`, the sum of 52 `F.cross_entropy`,
one optimizer with 52 parameter groups. The two sides take turns, so that a machine whose speed drifts treats both
alike.

The loop's heads share no parameter, so each of them is trained alone; the last column is how far a head of the bank is
from the loop's after as many steps from the same start, max |W − W'| / max |W'|, for the worst of the 52 heads. At most
1e-5 is promised.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.bank import HeadBank
from torchlin.losses import SoftmaxLoss

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
SETS, WIDTH, BATCH, BATCHES = 4, 512, 128, 16
# What the project promises, as a ratio of speeds.
TARGETS = {10: 5.0, 100: 1.5}


class Sweep(Protocol):
    def step(self, x: Tensor, y: Tensor) -> None:
        """Train all heads on x (sets, batch, width) and y (batch,)."""


class Bank:
    def __init__(self, classes: int, device: str) -> None:
        rates = [rate for _ in range(SETS) for rate in RATES]
        sets = [number for number in range(SETS) for _ in RATES]
        self.bank = HeadBank(WIDTH, classes, lr=rates, feature_set=sets, init="normal", device=device)
        self.optimizer = torch.optim.SGD(self.bank.parameters(), lr=1.0, momentum=0.9)
        self.bank.attach(self.optimizer)
        self.loss = SoftmaxLoss()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.bank.losses(x, y, self.loss).sum().backward()
        self.optimizer.step()


class Loop:
    """Heads that start where those of a bank are."""

    def __init__(self, bank: HeadBank) -> None:
        self.sets = bank.feature_set
        self.heads = [nn.Linear(WIDTH, bank.num_classes, device=bank.weight.device) for _ in bank.names]
        for index, head in enumerate(self.heads):
            head.load_state_dict(bank.head(index).state_dict())
        rates = bank.lr.tolist()
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(self.heads, rates, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)

    def step(self, x: Tensor, y: Tensor) -> None:
        losses = [F.cross_entropy(head(x[number]), y) for head, number in zip(self.heads, self.sets, strict=True)]
        self.optimizer.zero_grad()
        sum(losses, start=x.new_zeros(())).backward()
        self.optimizer.step()


def batches(classes: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of cached features that tell the classes apart to some degree."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(SETS, classes, WIDTH, generator=generator)
    made = []
    for _ in range(BATCHES):
        y = torch.randint(classes, (BATCH,), generator=generator)
        x = torch.randn(SETS, BATCH, WIDTH, generator=generator) + 0.2 * centres[:, y]
        made.append((x.to(device), y.to(device)))
    return made


def train(sweep: Sweep, data: list[tuple[Tensor, Tensor]], steps: int) -> float:
    """Seconds."""
    start = time.perf_counter()
    for number in range(steps):
        sweep.step(*data[number % len(data)])
    if data[0][0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speeds(sides: tuple[Sweep, Sweep], data: list[tuple[Tensor, Tensor]], rounds: int, steps: int) -> list[float]:
    """Steps per second of each side: the medians of several turns."""
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, times in zip(sides, taken, strict=True):
            times.append(steps / train(side, data, steps))
    return [statistics.median(times) for times in taken]


def largest_difference(bank: HeadBank, loop: Loop) -> float:
    """max |W − W'| / max |W'| of the head for which it is largest."""
    alone = torch.stack([head.weight.detach() for head in loop.heads])
    differences = (bank.weight.detach() - alone).flatten(1).abs().amax(1)
    return float((differences / alone.flatten(1).abs().amax(1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--steps", type=int, default=40, help="training steps in a turn")
    parser.add_argument("--compared-after", type=int, default=200, help="training steps before heads are compared")
    parser.add_argument("--classes", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu"
    place = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {options.threads} threads"
    print(
        f"torch {torch.__version__}, {place}, {SETS * len(RATES)} heads, float32, "
        f"medians of {options.rounds} turns of {options.steps} steps\n"
    )
    compared = f"difference after {options.compared_after} steps"
    print(f"| k | loop steps/s | HeadBank steps/s | ratio | promised | {compared} |")
    print("|---|---|---|---|---|---|")
    for classes in options.classes:
        data = batches(classes, options.device)
        ours = Bank(classes, options.device)
        theirs = Loop(ours.bank)
        for side in (theirs, ours):
            train(side, data, options.compared_after)
        difference = largest_difference(ours.bank, theirs)
        loop, bank = speeds((theirs, ours), data, options.rounds, options.steps)
        promise = f"≥ {TARGETS[classes]:g}" if classes in TARGETS else "–"
        print(
            f"| {classes} | {loop:.1f} | {bank:.1f} | {bank / loop:.2f} | {promise} | {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
