"""What `import torchlin` costs beyond `import torch`: fresh processes in turn, medians and the median difference.

python scripts/bench_import.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    seconds("torchlin")  # files into the cache of the system
    pairs = [(seconds("torch"), seconds("torchlin")) for _ in range(options.repeats)]
    torch, torchlin = (statistics.median(column) for column in zip(*pairs, strict=True))
    difference = statistics.median(b - a for a, b in pairs)
    print(f"import torch {torch:.2f} s, import torchlin {torchlin:.2f} s, difference {difference:+.3f} s")


if __name__ == "__main__":
    main()
