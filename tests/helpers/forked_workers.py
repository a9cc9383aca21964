"""Worker processes that start in milliseconds, forked with everything imported, and solve as a test says.

Only how they start is another: what they do and how they are listened to is the code that is tested.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from small_runs import skip_unless_forkable
from torch import nn

from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.config import TrainConfig
from qwen_fused.planner.make_agent import make_agent
from qwen_fused.qwen.prompt_text import ADDED_TOKENS, PromptText
from qwen_fused.qwen.tiny import byte_tokenizer, seeded
from qwen_fused.solver import worker, worker_process
from qwen_fused.solver.question import Encoded
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_solver import TaskAnswer

SETTINGS = SolveSettings(steps=3)


class ForkedProcess:
    """A forked child, as far as `Worker` knows processes."""

    def __init__(self, pid: int):
        self.pid, self.code = pid, None

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)


def use_forked_workers(monkeypatch, solve_task: Callable[..., TaskAnswer] | None = None) -> None:
    """Fork workers, and have those that solve do so by `solve_task`."""

    def start(self, job: bytes, theirs: Connection, command) -> ForkedProcess:
        skip_unless_forkable()
        process = os.fork()
        if process:
            return ForkedProcess(process)
        try:
            stdin = os.memfd_create("job")
            os.write(stdin, job)
            os.lseek(stdin, 0, os.SEEK_SET)
            for number, whence in enumerate((stdin, self.errors.fileno(), self.errors.fileno())):
                os.dup2(whence, number)
            # a fork has the locks and sockets of its parent, and what somebody still has open never ends
            os.closerange(3, theirs.fileno())
            os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if solve_task:
                worker.solve_task = solve_task
            sys.stdin, sys.argv = open(0), [command[-1], str(theirs.fileno())]  # noqa: SIM115
            importlib.import_module(command[-1]).main()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(71)

    monkeypatch.setattr(worker_process.WorkerProcess, "start", start)


class StandIn(nn.Module):
    """A planner whose agent is small and whose Qwen reads nothing."""

    class Prompt(nn.Module):
        prompt_text = PromptText(byte_tokenizer(ADDED_TOKENS), 512, 8192)

        def forward(self, demonstrations):
            return Encoded(torch.zeros(len(demonstrations), 4), torch.zeros(len(demonstrations), 15))

    def __init__(self):
        super().__init__()
        self.config = TrainConfig(agent_channels=8, prompt_dim=4, plan_steps=2)
        with seeded(0):
            self.agent, self.prompt = make_agent(self.config), self.Prompt()


def make_task(task_id: str, *, tests: int = 1, side: int = 3, answers: bool = True, pairs: int = 2) -> Task:
    """A task whose grids depend on its id; the answer is the query turned upside down."""
    rng = np.random.default_rng(int.from_bytes(task_id.encode()[:7], "little"))

    def pair(known: bool) -> Pair:
        grid = rng.integers(0, 10, (side, side)).astype(np.uint8)
        return Pair(grid, grid[::-1].copy() if known else None)

    return Task(task_id, tuple(pair(True) for _ in range(pairs)), tuple(pair(answers) for _ in range(tests)))


def answer_of(task: Task, *, steps: int = 3, seconds: float = 0.01) -> TaskAnswer:
    """Right in the first attempt where the id ends in an even digit, drawn from torch's generator in the second."""
    attempts = []
    for pair in task.test:
        drawn = torch.randint(0, 10, pair.input.shape).numpy().astype(np.uint8)
        right = task.id[-1] in "02468"
        attempts.append((pair.input[::-1].copy() if right else drawn, drawn))
    losses = tuple(1 / (step + 1) for step in range(steps))
    sure = (0.9 if task.id[-1] in "02468" else 0.2,) * len(attempts)
    return TaskAnswer(task.id, tuple(attempts), sure, seconds, steps, losses, 0.8, 0.5)


def stand_in(planner, task: Task, settings: SolveSettings, *, deadline=None) -> TaskAnswer:
    """Solves at once, or fails as the first word of the task's id says."""
    assert all(pair.output is None for pair in task.test), "a worker is sent no answer"
    fault = task.id.split("-")[0]
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exits":
        os.write(2, b"the last words\n")
        os._exit(3)
    if fault == "raises":
        raise IndexError("no such cell\nand more")
    if fault == "memory":
        raise MemoryError("unable to allocate 7 TiB")
    if fault == "waits":
        (Path(os.environ["STAND_IN"]) / task.id).touch()
        time.sleep(600)
    if fault == "slow":
        steps = 0
        while steps < settings.steps and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.05)
            steps += 1
        return answer_of(task, steps=steps)
    return answer_of(task)
