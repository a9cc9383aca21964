"""The worker processes of a start: each training is done by whichever is free, and one that fails is tried again.

A training depends on the start, the task and a seed alone, so that neither how many workers there are nor that one of
them died changes what comes of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from torch import Tensor

from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.start_message import Asked, read_trained
from qwen_fused.solver.start_training import Drawn, Trained, mean_of_all
from qwen_fused.solver.worker_process import MAX_FAILED_STARTS, POLL_SECONDS, WorkerProcess

COMMAND = (sys.executable, "-m", "qwen_fused.solver.start_worker")
# workers that may end in the middle of the same training
MAX_FAILURES = 2


class StartWorker(WorkerProcess):
    """One process and the place in the batch of what it is at."""

    at: int | None = None


class StartWorkers:
    """Some of them, ended on leaving the context.

    Args:
        job: config and settings, from `job_bytes`.
        count: processes.
        command: what to start as a worker.
    """

    def __init__(self, job: bytes, count: int, command: Sequence[str] = COMMAND):
        self.job, self.command = job, command
        self.workers: list[StartWorker] = []
        self.failed_starts = 0
        try:
            for _ in range(count):
                self.workers.append(StartWorker(job, command))
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> StartWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End every process."""
        for worker in self.workers:
            worker.end()

    def train(
        self,
        agent: GridAgent,
        chosen: Sequence[Drawn],
        encoded: Sequence[tuple[Tensor, Tensor]],
        should_stop: Callable[[], object] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Trained | None:
        """Train a copy of the agent on each task.

        Args:
            agent: the start.
            chosen: the tasks.
            encoded: of each what `encode_task` made of it.
            should_stop: asked several times a second; something true leaves all of them.
            meanwhile: called once while the first are under way.

        Returns:
            The mean of all, in order; None where it was stopped.

        Raises:
            RuntimeError: workers end before they have begun, or in the middle of the same training.
        """
        weights = dict(agent.named_parameters())
        questions = [Asked(weights, one, read).to_bytes() for one, read in zip(chosen, encoded, strict=True)]
        found: dict[int, Trained] = {}
        waiting, failures = list(range(len(chosen))), [0] * len(chosen)
        self.hand_out(questions, waiting)
        meanwhile()
        while len(found) < len(chosen):
            if should_stop():
                return None
            heard = wait([worker.connection for worker in self.workers], POLL_SECONDS)
            for worker in [worker for worker in self.workers if worker.connection in heard]:
                at = worker.at
                try:
                    content = worker.hear()
                except EOFError:
                    told = self.replace(worker)
                    if at is not None:
                        failures[at] += 1
                        if failures[at] == MAX_FAILURES:
                            raise RuntimeError(f"task {chosen[at].task.id} could not be trained on: {told}") from None
                        waiting.insert(0, at)
                    continue
                self.failed_starts = 0
                if at is not None and content is not None:
                    found[at], worker.at = read_trained(content), None
            self.hand_out(questions, waiting)
        return mean_of_all([found[place] for place in range(len(chosen))])

    def hand_out(self, questions: Sequence[bytes], waiting: list[int]) -> None:
        """Give those that are free something to do."""
        for worker in self.workers:
            if waiting and worker.ready and worker.at is None:
                worker.at = waiting.pop(0)
                worker.send(questions[worker.at])

    def replace(self, worker: StartWorker) -> str:
        """Start another in place of one that has ended; returns why it did."""
        told = worker.exit_reason()
        worker.end()
        self.failed_starts += not worker.ready
        if self.failed_starts == MAX_FAILED_STARTS:
            raise RuntimeError(f"a worker must start, but {told}")
        self.workers[self.workers.index(worker)] = StartWorker(self.job, self.command)
        return told
