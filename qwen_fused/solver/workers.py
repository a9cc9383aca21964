"""Questions for worker processes, one per core: one that dies costs the task that it was at, and is replaced."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait

from qwen_fused.arc.tasks import Task
from qwen_fused.solver.question import Question
from qwen_fused.solver.results import TaskResult, fallback
from qwen_fused.solver.worker_process import MAX_FAILED_STARTS, POLL_SECONDS, WorkerProcess

COMMAND = (sys.executable, "-m", "qwen_fused.solver.worker")
# a worker that has not answered so many seconds after the time for all tasks ended is ended too
GRACE_SECONDS = 60.0


class Worker(WorkerProcess):
    """One process and what it is at.

    Args:
        job: what all questions have in common, from `job_bytes`.
        command: what to start, the number of a socket to it as its last argument.
    """

    def __init__(self, job: bytes, command: Sequence[str] = COMMAND):
        super().__init__(job, command)
        self.task: Task | None = None

    def ask(self, question: Question) -> None:
        """Begin with a task."""
        self.task = question.task
        self.send(question.to_bytes())

    def receive(self) -> TaskResult | None:
        """What it says: a row, or None when it has started.

        Raises:
            EOFError: it has ended.
        """
        content = self.hear()
        if content is None:
            return None
        self.task = None
        return TaskResult.from_plain(json.loads(content))


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
