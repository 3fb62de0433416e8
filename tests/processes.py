"""Functions called in processes of their own, which may be several that train together, and which may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

if os.name != "posix":
    pytest.skip("processes are started and killed as on POSIX systems", allow_module_level=True)

SECONDS = 240  # far more than anything here needs, so that nothing hangs for ever

# Processes that have loaded everything when they begin, and have run nothing.
_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torchlin.cli.training", "torchlin.data", "torchlin.report"])


def _child(function: Callable[..., object], arguments: Sequence[object], variables: dict[str, str], log: str) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(function(*arguments))


def exit_codes(
    folder: Path,
    function: Callable[..., object],
    *arguments: object,
    variables: Mapping[str, str] | None = None,
    processes: int = 1,
) -> tuple[list[int | None], str]:
    """Call a function in each of some processes, as Lightning's `ddp` would start them: their exit codes and output.

    A function returns None or 0 where all is well. A process that outlives the time limit is a failure.
    """
    logs = [folder / f"process-{rank}.log" for rank in range(processes)]
    common = {"TORCHLIN_CACHE": os.environ["TORCHLIN_CACHE"], "OMP_NUM_THREADS": "1", **(variables or {})}
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank, log in enumerate(logs):
        ranks = {} if processes == 1 else {**together, "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        arguments_of_child = (function, arguments, {**common, **ranks}, str(log))
        started.append(_FRESH.Process(target=_child, args=arguments_of_child))
        started[-1].start()
    deadline = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    hang = [process for process in started if process.is_alive()]
    for process in hang:
        process.kill()
        process.join()
    output = "\n".join(log.read_text() for log in logs if log.exists())
    if hang:
        pytest.fail(f"{len(hang)} of {processes} processes still run after {SECONDS} s:\n{output}")
    return [process.exitcode for process in started], output


def in_process(
    folder: Path, function: Callable[..., object], *arguments: object, kill: str = "never", processes: int = 1
) -> None:
    """Call a function in processes which must end well, or be killed where `kill` says (see killing.py)."""
    codes, output = exit_codes(folder, function, *arguments, variables={"KILL": kill}, processes=processes)
    if kill == "never":
        assert codes == [0] * processes, output
    elif processes == 1:
        assert codes == [-signal.SIGKILL], output
    else:  # the first that is killed may take the others along
        assert -signal.SIGKILL in codes, output
        assert 0 not in codes, output


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
