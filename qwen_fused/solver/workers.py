"""Worker processes: one per core with one thread each; one that dies costs the task that it was at, and is replaced.

Fresh processes and no forks: they hold what they are sent and nothing else, whatever threads, CUDA contexts or answers
the process that starts them has.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from qwen_fused.arc.tasks import Task
from qwen_fused.solver.question import Question
from qwen_fused.solver.results import TaskResult, fallback

COMMAND = (sys.executable, "-m", "qwen_fused.solver.worker")
# a worker that has not answered so many seconds after the time for all tasks ended is ended too
GRACE_SECONDS = 60.0
# seconds between looks for a signal
POLL_SECONDS = 0.2
# microseconds of CPU in how many, of a container
CGROUP = Path("/sys/fs/cgroup/cpu.max")
# processes in a row that end before they have begun
MAX_FAILED_STARTS = 3


class Worker:
    """One process and what it is at.

    Args:
        job: what all questions have in common, from `job_bytes`.
        command: what to start, the number of a socket to it as its last argument.
    """

    def __init__(self, job: bytes, command: Sequence[str] = COMMAND):
        self.connection, theirs = Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.process = self.start(job, theirs, command)
        self.task: Task | None = None
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

    def ask(self, question: Question) -> None:
        """Begin with a task."""
        self.task = question.task
        # where it is no longer there, its end is seen when it is listened to
        with suppress(OSError):
            self.connection.send_bytes(question.to_bytes())

    def receive(self) -> TaskResult | None:
        """What it says: a row, or None when it has started.

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
        self.task = None
        return TaskResult.from_plain(json.loads(content))

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


def run_workers(
    job: bytes,
    questions: Iterator[Question | TaskResult],
    count: int,
    *,
    deadline: float | None = None,
    should_stop: Callable[[], object] = lambda: None,
    command: Sequence[str] = COMMAND,
) -> Iterator[TaskResult]:
    """Put questions to `count` processes; yields rows as they are done, in any order.

    Questions are drawn one ahead of who is free. What comes as a row already, as it could not be asked, is handed on.

    Args:
        job: what all questions have in common, from `job_bytes`.
        questions: each a task to solve, or its row.
        count: processes.
        deadline: on `time.monotonic()`'s clock; no task begins after it, and those begun end soon after it.
        should_stop: something true where tasks that are not done should be left.
        command: what to start as a worker.

    Raises:
        RuntimeError: workers end before they have begun.
    """
    failed_starts = 0
    drawn: Question | None = None
    more = True
    workers = [Worker(job, command) for _ in range(count)]
    try:
        while not should_stop():
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                drawn, more = None, False
            if left < -GRACE_SECONDS:
                return
            idle = next((worker for worker in workers if worker.ready and worker.task is None), None)
            if drawn is not None and idle is not None:
                idle.ask(replace(drawn, seconds=None if deadline is None else left))
                drawn = None
            if drawn is None and more:
                question = next(questions, None)
                more = question is not None
                if isinstance(question, TaskResult):
                    yield question
                else:
                    drawn = question
                continue
            if drawn is None and all(worker.task is None for worker in workers):
                return
            heard = wait([worker.connection for worker in workers], POLL_SECONDS)
            for worker in [worker for worker in workers if worker.connection in heard]:
                try:
                    row = worker.receive()
                    failed_starts = 0
                    if row is not None:
                        yield row
                except EOFError:
                    told = worker.exit_reason()
                    worker.end()
                    failed_starts += not worker.ready
                    if failed_starts == MAX_FAILED_STARTS:
                        raise RuntimeError(f"a worker must start, but {told}") from None
                    if worker.task is not None:
                        yield fallback(worker.task, told)
                    workers[workers.index(worker)] = Worker(job, command)
    finally:
        for worker in workers:
            worker.end()
