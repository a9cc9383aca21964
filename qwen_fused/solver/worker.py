"""One worker process: takes a task's question, trains on it, sends the answer, and waits for the next.

It holds the agent and no Qwen: whoever asks has Qwen read the demonstrations and sends the prompts with them. Outputs
of test pairs never come here. It ends with whoever started it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from qwen_fused.solver.question import Job, Question, ReadPlanner
from qwen_fused.solver.results import TaskResult, digest, fallback
from qwen_fused.solver.task_solver import solve_task


def answer(job: Job, question: Question) -> TaskResult:
    """Solve one task; what goes wrong costs this task alone."""
    started = time.monotonic()
    task, settings = question.task, job.settings
    deadline = None if question.seconds is None else started + question.seconds
    # whatever draws without a generator of its own draws alike in every process and order
    seed = hashlib.sha256(f"{settings.seed}:{task.id}".encode()).digest()
    torch.manual_seed(int.from_bytes(seed[:7], "little"))
    try:
        found = solve_task(ReadPlanner(job.agent, question), task, settings, deadline=deadline)  # type: ignore[arg-type]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return fallback(task, reason, time.monotonic() - started)
    cut = deadline is not None and time.monotonic() >= deadline and found.steps < settings.steps
    return TaskResult(found, digest(task), cut=cut)


def serve(job: Job, connection: Connection) -> None:
    """Answer questions until the other side closes."""
    answer_each(connection, lambda content: json.dumps(answer(job, Question.from_bytes(content)).to_plain()).encode())


def answer_each(connection: Connection, answered: Callable[[bytes], bytes]) -> None:
    """Say that this process has begun, then answer what comes until the other side closes."""
    received: queue.Queue[bytes] = queue.Queue()

    def receive() -> None:
        try:
            while True:
                received.put(connection.recv_bytes())
        except (EOFError, OSError):
            # nobody waits for the answer, in the middle of a task too
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    connection.send_bytes(b"ready")
    while True:
        connection.send_bytes(answered(received.get()))


def run_as_worker(serve: Callable[[Job, Connection], None]) -> None:
    """What a worker process does: with one thread, by the `Job` on standard input and the socket of that number."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        # where memory runs out a worker goes, and not whoever holds all the answers
        score.write("500")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(Job.from_bytes(sys.stdin.buffer.read()), Connection(int(sys.argv[1])))


def main() -> None:
    """`python -m qwen_fused.solver.worker NUMBER`: of an inherited socket; a `Job` on standard input."""
    run_as_worker(serve)


if __name__ == "__main__":
    main()
