"""Processes that train together, without the seconds of imports that torchrun's own would take."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from small_runs import fork
from torch.distributed import TCPStore

# of a call that takes seconds; only a process that waits for one that is gone comes near it
PATIENCE = 600


def run_ranks(call: Callable[[int], int], folder: Path, count: int = 2) -> list[int]:
    """Call once in each of `count` processes with its rank, as torchrun would; returns their exit codes.

    What a process says is in folder/rank-N.txt. Each starts as a copy of this one, with everything imported.
    """
    # torchrun's own way: the launcher holds the port, and nobody can take it in between
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def start(rank: int) -> int:
        def begin() -> int:
            os.environ |= {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # a copy of a process cannot use its GPU
            torch.cuda.is_available = lambda: False
            return call(rank)

        return fork(begin, folder / f"rank-{rank}.txt")

    running, codes = {start(rank): rank for rank in range(count)}, {}
    due = time.monotonic() + PATIENCE
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > due:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(count)]


def said(folder: Path, rank: int) -> str:
    """Everything that a process said."""
    return (folder / f"rank-{rank}.txt").read_text()
