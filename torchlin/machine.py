"""What the machine has to give: memory and threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken now without swapping, as far as the system tells; otherwise 2 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(v for v in Path("/proc/meminfo").read_text().splitlines() if v.startswith("MemAvailable"))
        limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        root = Path("/sys/fs/cgroup")
        limits.append(int((root / "memory.max").read_text()) - int((root / "memory.current").read_text()))
    if not limits:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    return max(0, min(limits, default=2 << 30))


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """With this number of threads; None leaves it as it is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
