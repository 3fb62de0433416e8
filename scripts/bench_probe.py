"""Linear probes on CIFAR-10: a path of λ beside scikit-learn's, and the accuracy of features learned without labels.

    python scripts/bench_probe.py [path accuracy] --root FOLDER [--threads N] [--patches 1600]

path      45 values of C from 1e-6 to 1e5 (the grid of CLIP's and DINOv2's probes) on 50,000 × 512 PatchFeatures,
          standardised for both sides: `solve_path`, every λ certified to 1e-4, beside scikit-learn's
          LogisticRegression(lbfgs, max_iter=1000), which is timed at the 1st, 12th, 23rd, 34th and 45th value; its time
          for all is interpolated linearly between these
accuracy  `torchlin probe` with PatchFeatures, everything included, in an empty cache

FOLDER holds train/ and test/ with one folder of images per class.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from cifar10 import train_pixels
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from torchlin import L2, FeatureMatrix, LinearProbe, solve_path
from torchlin.data import ImageFolderDataModule
from torchlin.patches import PatchFeatures
from torchlin.probe import load_backbone


def path(root: str, patches: int, num: int, iterations: int) -> None:
    images, y = train_pixels(root)
    images = images.view(-1, 3, 32, 32)
    network = PatchFeatures(patches).fit(images)
    features = torch.cat([network(block) for block in images.split(1000)])
    n = len(y)
    cs = np.logspace(-6, 5, num)
    strengths = [1 / (2 * n * c) for c in cs]
    found = solve_path(features, y, "softmax", L2, strengths=strengths, tol=1e-4, max_passes=10_000)
    worst = max(s.gap for s in found.solutions)
    ready = FeatureMatrix.of(features).rows(slice(0, n)).numpy()  # float32, as both sides have them
    which = sorted({round(i * (num - 1) / 4) for i in range(5)})
    times, notes = [], []
    for i in which:
        model = LogisticRegression(C=cs[i], max_iter=iterations, solver="lbfgs")
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(ready, y.numpy())
        times.append(time.perf_counter() - started)
        stopped = any(issubclass(w.category, ConvergenceWarning) for w in caught)
        weight, bias = (torch.from_numpy(a).double() for a in (model.coef_, model.intercept_))
        scores = torch.from_numpy(ready).double() @ weight.T + bias
        objective = float(F.cross_entropy(scores, y)) + strengths[i] * float(weight.square().sum())
        ours = found.solutions[i].objective
        notes.append((cs[i], times[-1], "max_iter" if stopped else "tol", (objective - ours) / ours))
    total = float(np.interp(np.arange(num), which, times).sum())
    print(f"\n| {n:,} × {features.shape[1]}, {num} values of C | seconds | |\n|---|---|---|")
    print(f"| torchlin, every gap at most {worst:.1e}, {found.passes:g} passes | {found.seconds:.1f} | |")
    for c, seconds, stopped, above in notes:
        print(f"| scikit-learn, C = {c:.2g}, F {above:+.1e} of torchlin's, ended by {stopped} | {seconds:.1f} | |")
    ratio = total / found.seconds
    print(f"| scikit-learn, all, interpolated | {total:.0f} | {ratio:.0f} times (promised 30) |", flush=True)


def accuracy(root: str, patches: int) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        data = ImageFolderDataModule(root, cache_dir=cache)
        probe = LinearProbe(load_backbone("PatchFeatures", patches=patches), cache_dir=cache)
        result = probe.fit(data)
        seconds = time.perf_counter() - started
        size = sum(p.stat().st_size for p in Path(cache).rglob("features.bin"))
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    print(f"\n| PatchFeatures, {patches} patches, {result.head.in_features:,} features | | promised |\n|---|---|---|")
    print(f"| {result.choice.chosen}; chosen on {result.choice.chosen_on} | {result.metrics['val_accuracy']:.4f} | |")
    print(f"| test accuracy, {result.sizes['test']:,} images | {result.metrics['test_accuracy']:.4f} | ≥ 0.76 |")
    print(f"| top-5 | {result.metrics.get('test_top5_accuracy', float('nan')):.4f} | |")
    print(f"| minutes, everything included ({parts}) | {seconds / 60:.1f} | ≤ 20 |")
    print(f"| features on disk, GB | {size / 1e9:.1f} | |", flush=True)


def main() -> None:
    names = ["path", "accuracy"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--root", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patches", type=int, default=1600, help="of accuracy")
    parser.add_argument("--path-patches", type=int, default=64, help="of path: 8 features each")
    parser.add_argument("--num", type=int, default=45, help="values of C")
    parser.add_argument("--iterations", type=int, default=1000, help="scikit-learn's max_iter")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"unknown part {unknown.pop()!r}; known: {', '.join(names)}")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {options.threads} threads")
    if "path" in options.parts:
        path(options.root, options.path_patches, options.num, options.iterations)
    if "accuracy" in options.parts:
        accuracy(options.root, options.patches)


if __name__ == "__main__":
    main()
