"""Accuracy, zeros and seconds of the named configurations on digits and on CIFAR-10 as a folder of images.

    python scripts/accuracy.py --root FOLDER [--config cifar10-hinge ...]

FOLDER holds train/ and test/ with one folder of images per class. Each row is one `torchlin fit --config NAME`, the
seconds its whole process, reading the images and drawing the pictures included.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import torchlin
from torchlin.cli.configs import config_names

# What the project promises: test accuracy at least, and for the sparse one a share of non-zero weights at most.
PROMISED = {
    "digits-softmax": 0.955,
    "cifar10-softmax": 0.410,
    "cifar10-hinge": 0.393,
    "cifar10-squared-hinge": 0.388,
    "cifar10-perceptron": 0.30,
    "cifar10-sparse": 0.39,
}


def fit(config: str, root: str | None, folder: Path) -> tuple[dict[str, float], float]:
    command = [sys.executable, "-m", "torchlin", "fit", "--config", config, "--run", str(folder)]
    if config.startswith("cifar10") and root:
        command += ["--data.root", root]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return torchlin.load_head(folder).info["metrics"], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="CIFAR-10 as a folder of images; without it only digits are run")
    parser.add_argument("--config", nargs="*", help="configurations to run (default: all that have their data)")
    options = parser.parse_args()
    data = ("digits", "cifar10") if options.root else ("digits",)
    configs = options.config or [name for name in config_names() if name.startswith(data)]
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| configuration | validation accuracy | test accuracy | promised | exact zeros | seconds |")
    print("|---|---|---|---|---|---|")
    for name in configs:
        with tempfile.TemporaryDirectory() as work:
            metrics, seconds = fit(name, options.root, Path(work) / "run")
        promised = f"≥ {PROMISED[name]}" if name in PROMISED else "–"
        print(
            f"| `{name}` | {metrics['val_accuracy']:.4f} | {metrics['test_accuracy']:.4f} | {promised} | "
            f"{1 - metrics['nonzero']:.1%} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
