"""Many tasks side by side, each with weights of its own: what `adapt` does one by one, in one graph.

    TrainingSets (host, a generator each) ─► what to draw ─► ViewTable ─► StackedPlanner ─► one efe_loss
        ─► GroupGradNorm, a group per task ─► StackedOptimizer

`GroupGradNorm` measures and clips each task by itself, in one read of all gradients. For devices that one task cannot
fill; on a CPU one by one is faster, and the two are equal up to rounding. On CUDA a step is a graph, and the host reads
nothing before the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_fused.arc.episodes import Task
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.adapt import Schedule, step_weights
from qwen_fused.solver.captured import CapturedStep, HostRing
from qwen_fused.solver.examples import TrainingSet, task_rng
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.stacked import StackedPlanner, stack_prompts, stacked_loss
from qwen_fused.solver.stacked_optimizer import StackedOptimizer
from qwen_fused.solver.view_table import WIDTH, ViewTable


@dataclass(frozen=True, eq=False)
class AdaptedMany:
    """Planners that have been trained on a task each."""

    stacked: StackedPlanner
    steps: int
    """Training steps done, by each."""
    seconds: float
    """Wall time of the training of all."""
    losses: list[tuple[float, ...]]
    """For each task the loss of every training step, as `Adapted` has it."""


def adapt_many(
    agent: GridAgent,
    encoded: Sequence[tuple[Tensor, Tensor]],
    tasks: Sequence[Task],
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    on_step: Callable[[int], object] = lambda step: None,
    capture: bool = True,
) -> AdaptedMany:
    """Train a copy of the agent on each task's demonstrations, all at once, on the device of its parameters.

    Args:
        agent: what every task starts from; it stays as it is.
        encoded: of each task what `encode_task` makes of it.
        tasks: at least one. Their grids share a canvas: put tasks of like sizes together.
        settings, deadline: as `adapt` takes them; `task_seconds` is for all the tasks together.
        on_step: called after every step with its number, from 1; what it raises ends the training.
        capture: on CUDA, record a step as a graph.
    """
    started = time.monotonic()
    device = agent.copy_scale.device
    stacked = StackedPlanner(agent, *stack_prompts(encoded, device), muon=settings.matrix_lr > 0)
    if settings.steps == 0:
        return AdaptedMany(stacked, 0, time.monotonic() - started, [()] * len(tasks))
    step = TrainingStep(stacked, tasks, settings, capture)
    # a capture takes a second, which is no training
    begun = time.monotonic()
    ends = [t for t in (deadline, begun + settings.task_seconds if settings.task_seconds else None) if t is not None]
    schedule = Schedule(settings, begun, min(ends) if ends else None)
    steps = 0
    while (share := schedule.at(steps)) is not None:
        step.run(steps, share)
        steps += 1
        on_step(steps)
    step.optimizer.swap_in()
    # here the host waits for the device
    losses = step.losses[:steps].T.tolist()
    return AdaptedMany(stacked, steps, time.monotonic() - started, [tuple(curve) for curve in losses])


class TrainingStep:
    """One step of every task, over and over.

    Args:
        stacked: what is trained.
        tasks: K of them.
        settings: what to do.
        capture: on CUDA, record it as a graph.
    """

    def __init__(self, stacked: StackedPlanner, tasks: Sequence[Task], settings: SolveSettings, capture: bool = True):
        device = stacked.prompts.device
        self.stacked = stacked
        self.table = ViewTable(tasks, settings, device)
        self.training = [TrainingSet(task, settings, task_rng(settings, task.id)) for task in tasks]
        self.norms = GroupGradNorm(stacked.task_parameters())
        # on the device, as a graph copies nothing from the host
        self.clip = torch.full((1,), settings.clip, dtype=torch.float64, device=device)
        self.optimizer = StackedOptimizer(stacked, settings)
        self.step_weight = step_weights(stacked.body[0].agent.steps, settings.early_step_weight).to(device)
        weights = [0.0 if size_rule(task) else settings.size_weight for task in tasks]
        self.size_weight = torch.tensor(weights, dtype=stacked.decays.dtype).to(device)
        shape = (len(tasks), settings.batch, WIDTH)
        self.ring = HostRing(shape, torch.int64, device)
        self.drawn = torch.zeros(shape, dtype=torch.int64, device=device)
        self.drawn[..., 2:] = torch.arange(WIDTH - 2, device=device)
        self.drawn[..., 0] = torch.arange(len(tasks), device=device)[:, None] * self.table.place(1, 0, 0)
        self.own = torch.zeros(len(tasks), dtype=stacked.decays.dtype, device=device)
        self.losses = self.own.new_zeros(settings.steps, len(tasks))
        self.captured = CapturedStep(self.step, self.optimizer.reset, device, capture)

    def run(self, number: int, share: float) -> None:
        """The next step.

        Args:
            number: from 0.
            share: of the learning rates.
        """
        host = self.ring.next()
        self.table.draw(self.training, host.numpy())
        self.drawn.copy_(host, non_blocking=True)
        self.optimizer.schedule(number, share)
        self.captured()
        self.losses[number].copy_(self.own)
        self.ring.used()

    def step(self) -> None:
        """What a graph holds."""
        batch = self.table.examples(self.drawn)
        plan, sizes = self.stacked(batch)
        loss, own = stacked_loss(plan, sizes, batch, self.step_weight, self.size_weight)
        # in place: the tasks' gradients are rows of these
        for stack in self.stacked.stacks:
            assert stack.grad is not None
            stack.grad.zero_()
        loss.backward()
        self.norms.clip_(self.norms.measure(), self.clip)
        self.optimizer.step()
        self.own.copy_(own.detach())
