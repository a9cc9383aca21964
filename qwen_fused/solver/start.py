"""A start that tasks are near: first-order MAML (Finn et al. 2017) and Reptile (Nichol et al. 2018) over tasks.

    start ─► a copy is trained on a task but for one pair, as `adapt` trains it ─► loss on the pair left out
      ▲            │ Reptile: a share of the way                                          │ its gradient there,
      └────────────┴─────────────────── MAML: a step of AdamW ◄───────────────────────────┘ taken for the start's

Random weights are far from every task, and so are weights that were trained to answer without training: neither has
ever been asked to learn. Reptile alone makes a start that learns the pairs it is shown soon; the pair left out is what
asks it to learn the rule. No gradient passes through the steps themselves. The start is apart from the run's own agent,
which goes on answering as it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.tasks import Task
from qwen_fused.config import require
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.examples import canvas_of
from qwen_fused.solver.parts import narrowed
from qwen_fused.solver.question import job_bytes
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.start_training import Drawn, Trained, train_side_by_side
from qwen_fused.solver.start_workers import COMMAND, StartWorkers
from qwen_fused.solver.task_planner import encode_task, lines_agent
from qwen_fused.solver.worker_process import usable_cores

if TYPE_CHECKING:
    from qwen_fused.planner.model import QwenPlanner

# what is done for a task: few steps, since many tasks make a start
INNER = SolveSettings(steps=20)
# share of the way to a task's weights that the start goes, and AdamW's learning rate by the pair left out; both fall to
# a fiftieth over the last seven tenths
RATE, OUTER_LR, DECAY_FROM, LEAST = 0.15, 1e-3, 0.3, 0.02
OUTER_BETAS, OUTER_DECAY = (0.9, 0.98), 0.01
# tasks of a batch, whose mean the start goes towards as far as it would go one by one: what two cores do at once, and
# what a GPU does
BATCH, SIDE_BY_SIDE = 2, 16
# so many tasks in a row are put in order of size, so that those of a batch are done at about the same time
ALIKE = 8


class Start:
    """A start that is being learned, or is done.

    Args:
        agent: what it begins from; changed.
    """

    def __init__(self, agent: GridAgent):
        self.agent = agent
        self.optimizer = torch.optim.AdamW(
            agent.parameters(), lr=OUTER_LR, betas=OUTER_BETAS, weight_decay=OUTER_DECAY, fused=True
        )
        self.tasks = 0
        """Trainings on a task so far."""
        self.done = False
        self.curve: list[float] = []
        """Of each of them the loss on the pair left out."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        state = {"tasks": self.tasks, "done": self.done, "curve": self.curve}
        return {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tasks, self.done, self.curve = state["tasks"], state["done"], list(state["curve"])

    @torch.no_grad()
    def move(self, found: Trained, share: float) -> None:
        """Go towards where training on some tasks led, and along the gradient found there.

        Args:
            found: on how many tasks it is the mean of decides how far.
            share: of the learning that is done.
        """
        left = max(LEAST, min(1.0, (1 - share) / (1 - DECAY_FROM)))
        way = 1 - (1 - RATE * left) ** len(found.losses)
        for name, parameter in self.agent.named_parameters():
            parameter.lerp_(found.weights[name].to(parameter), way)
            parameter.grad = found.gradients[name].to(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = OUTER_LR * left
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tasks += len(found.losses)
        self.curve += found.losses

    def describe(self) -> str:
        """What tasks cost by now, and did."""
        then, now = median_of(self.curve[:100]), median_of(self.curve[-100:])
        steps = f"after {INNER.steps} steps on the others"
        return f"median loss on a pair left out {steps} {now:.3f}, {then:.3f} in the beginning"


def learn_start(
    planner: QwenPlanner,
    tasks: Sequence[Task],
    start: Start,
    *,
    most: int,
    seconds: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    should_stop: Callable[[], object] = lambda: None,
    on_task: Callable[[int], object] = lambda done: None,
    command: Sequence[str] = COMMAND,
) -> None:
    """Go on learning a start, in place, until it is done or something stops it.

    Args:
        planner: its Qwen reads the tasks; it stays as it is.
        tasks: training tasks; the half with the smaller grids is trained on, in turns, by its train pairs alone. Those
            with one train pair are left out.
        start: new, or as it was when it was stopped.
        most: trainings on a task, in all.
        seconds: end after about so many; how far the start goes falls with them.
        seed: of the order, and of each training.
        workers: processes, where the start is on a CPU; by default one per core. The start is the same for any number.
        should_stop: asked several times a second; something true leaves the rest.
        on_task: called with the number of trainings done, after each batch.
        command: what to start as a worker.

    Raises:
        ValueError: no task has two train pairs.
        RuntimeError: workers cannot start, or end in the middle of the same training.
    """
    whole = {task.id: task for task in tasks}
    small = smaller_half([narrowed(task) for task in tasks if len(task.train) > 1])
    require(bool(small), "tasks", "at least one with two train pairs", [task.id for task in tasks])
    on_device = start.agent.copy_scale.is_cuda
    size = min(SIDE_BY_SIDE if on_device else BATCH, len(small))
    encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def batch(first: int) -> list[Drawn]:
        return [draw(small, number, seed) for number in range(first, min(first + size, most))]

    def read(chosen: Sequence[Drawn]) -> list[tuple[Tensor, Tensor]]:
        for task in (one.task for one in chosen):
            if task.id not in encoded:
                encoded[task.id] = encode_task(planner, whole[task.id], INNER.symmetries)
        return [encoded[one.task.id] for one in chosen]

    began, before = time.monotonic(), start.tasks / most
    opened = side_by_side() if on_device else in_workers(planner, min(workers or usable_cores(), size), command)
    with opened as train:
        while not should_stop():
            share = start.tasks / most
            if seconds is not None:
                share = max(share, before + (1 - before) * (time.monotonic() - began) / seconds)
            if share >= 1:
                start.done = True
                return
            chosen, following = batch(start.tasks), batch(start.tasks + size)
            found = train(start.agent, chosen, read(chosen), should_stop, partial(read, following))
            if found is None:
                return
            start.move(found, share)
            on_task(start.tasks)


class Train(Protocol):
    """How a batch is trained on: returns None where it was stopped; `meanwhile` is called where there is time."""

    def __call__(
        self,
        agent: GridAgent,
        chosen: Sequence[Drawn],
        encoded: Sequence[tuple[Tensor, Tensor]],
        should_stop: Callable[[], object],
        meanwhile: Callable[[], object],
    ) -> Trained | None: ...


@contextmanager
def side_by_side() -> Iterator[Train]:
    """On the device of the agent's parameters."""
    yield lambda agent, chosen, encoded, *_: train_side_by_side(agent, chosen, encoded, INNER)


@contextmanager
def in_workers(planner: QwenPlanner, count: int, command: Sequence[str]) -> Iterator[Train]:
    """By worker processes with one thread each."""
    with StartWorkers(job_bytes(planner, INNER), count, command) as workers:
        yield workers.train


def smaller_half(tasks: Sequence[Task]) -> list[Task]:
    """The half of the tasks whose train pairs need the smaller canvases, in order of size: more can be trained on."""
    by_size = sorted(tasks, key=lambda task: (max(canvas_of_pairs(task)), task.id))
    return by_size[: (len(by_size) + 1) // 2]


def canvas_of_pairs(task: Task) -> tuple[int, int]:
    """The canvas that a task's train pairs need."""
    return canvas_of([grid.shape for pair in task.train for grid in (pair.input, pair.output)])  # type: ignore[union-attr]


def draw(tasks: Sequence[Task], number: int, seed: int) -> Drawn:
    """What to train on in the training of this number, from 0: all tasks in random order, then all again.

    Args:
        tasks: in order of size.
        number: of the training.
        seed: of the order and of the training.
    """
    turn, place = divmod(number, len(tasks))
    order = np.random.default_rng([seed, turn]).permutation(len(tasks))
    first = place - place % ALIKE
    task = tasks[np.sort(order[first : first + ALIKE])[place - first]]
    rng = np.random.default_rng([seed, turn, place])
    return Drawn(task, int(rng.integers(len(task.train))), int(rng.integers(2**31)))


def with_agent(planner: QwenPlanner, agent: GridAgent) -> QwenPlanner:
    """The same planner with another agent; Qwen and all else is shared with it."""
    lines_agent(planner)
    other = copy.copy(planner)
    other._modules = {**planner._modules, "agent": agent}
    return other


def median_of(values: Sequence[float]) -> float:
    """Their median; nan of none."""
    return float(np.median(values)) if values else float("nan")
