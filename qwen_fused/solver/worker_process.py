"""A worker process, seen from whoever starts it: fresh, with one thread, and ended with its parent.

No fork: it holds what it is sent and nothing else, whatever threads, CUDA contexts or answers its parent has.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

# seconds between looks for a signal, while workers are listened to
POLL_SECONDS = 0.2
# microseconds of CPU in how many, of a container
CGROUP = Path("/sys/fs/cgroup/cpu.max")
# processes in a row that end before they have begun
MAX_FAILED_STARTS = 3


class WorkerProcess:
    """One process.

    Args:
        job: what all that it is asked has in common, for its standard input.
        command: what to start, the number of a socket to it as its last argument.
    """

    def __init__(self, job: bytes, command: Sequence[str]):
        self.connection, theirs = Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.process = self.start(job, theirs, command)
        self.ready = False

    def start(self, job: bytes, theirs: Connection, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start the process."""
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            # what is imported here is imported there, and what lies in the current folder is not
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONSAFEPATH": "1",
            # a worker is a core
            "CUDA_VISIBLE_DEVICES": "",
        }
        # a file, because a process that is still starting empties no pipe
        with tempfile.TemporaryFile() as stdin:
            stdin.write(job)
            stdin.seek(0)
            return subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), env=environment,
                stdin=stdin, stdout=self.errors, stderr=self.errors,
                # Ctrl-C is for the process that asks, which ends its workers
                start_new_session=True,
            )  # fmt: skip

    def send(self, content: bytes) -> None:
        """Ask it something. Where it is no longer there, its end is seen when it is listened to."""
        with suppress(OSError):
            self.connection.send_bytes(content)

    def hear(self) -> bytes | None:
        """What it says, or None when it has started.

        Raises:
            EOFError: it has ended.
        """
        try:
            content = self.connection.recv_bytes()
        except OSError as error:
            raise EOFError from error
        if not self.ready:
            self.ready = True
            return None
        return content

    def exit_reason(self) -> str:
        """In a sentence: the signal or code, and the last line it said."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code == -signal.SIGKILL:
            return "its worker process was ended by SIGKILL: memory may have run out"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"its worker process {how}" + (f" ({last[:200]})" if last else "")

    def end(self) -> None:
        """End the process, if it has not."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.errors.close()


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where its control group gives it less time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CGROUP.read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores
