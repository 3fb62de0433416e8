"""Exact zeros under an L1 penalty with mini-batches, by the window of `apply_penalty`.

    python scripts/bench_sparsity.py --root FOLDER [--strength 0.001] [--epochs 10]

FOLDER holds train/ and test/ with one folder of images per class (CIFAR-10 as images). Softmax on standardised pixels,
SGD with momentum 0.9, batches of 128, cosine schedule: only the window changes. Window 1 is the plain proximal step.
The objective is F on the training split, so lower is better.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from torchlin import L1, LinearHead, Objective, SoftmaxLoss, apply_penalty
from torchlin.data import ArrayDataModule, ImageFolderDataModule


def split(data: ArrayDataModule, loader: object) -> tuple[Tensor, Tensor]:
    """All of a split, standardised: (n, p) float32 and (n,)."""
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    mean, std = data.standardization
    return (x.flatten(1).float() / 255 - mean) / std, y


def train(x: Tensor, y: Tensor, penalty: L1, window: int, epochs: int, lr: float, batch: int = 128) -> LinearHead:
    generator = torch.Generator().manual_seed(0)
    head, loss = LinearHead(x.shape[1], int(y.max()) + 1), SoftmaxLoss(validate=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    apply_penalty(optimizer, head, penalty, window=window)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(head(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--strength", type=float, default=0.001)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.001)
    options = parser.parse_args()
    data = ImageFolderDataModule(options.root)
    x, y = split(data, data.train_dataloader())
    x_test, y_test = split(data, data.test_dataloader())
    penalty, epoch = L1(options.strength), math.ceil(len(x) / 128)
    objective = Objective(SoftmaxLoss(), penalty)
    print(f"λ = {options.strength}, {options.epochs} epochs of {epoch} steps\n")
    print("| window, steps | exact zeros | test accuracy | F | seconds |")
    print("|---|---|---|---|---|")
    for window, name in ((1, "1 (plain proximal step)"), (epoch, f"{epoch} (one epoch)"), (10**9, "everything")):
        start = time.perf_counter()
        head = train(x, y, penalty, window, options.epochs, options.lr)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            value = float(objective.value(objective.loss(head(x), y), head))
            accuracy = float((head.predict(x_test) == y_test).float().mean())
            zeros = float((head.weight == 0).float().mean())
        print(f"| {name} | {zeros:.1%} | {accuracy:.4f} | {value:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
