"""Test-time training: a copy of the planner learns one task from the task's own demonstrations.

    pairs x symmetries x recolourings ──► batches ──► TaskPlanner ──► efe_loss ──► clip ──► step ──► moving average

What comes out depends on the planner, the demonstrations, the settings and the task's id, and on nothing else; with a
time limit, also on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen_fused.arc.episodes import Task
from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.examples import TrainingSet, examples, task_rng
from qwen_fused.solver.parts import narrowed
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.task_optimizer import TaskOptimizer
from qwen_fused.solver.task_planner import TaskPlanner, encode_task, lines_agent, plan_loss

if TYPE_CHECKING:
    from qwen_fused.planner.model import QwenPlanner


@dataclass(frozen=True, eq=False)
class Adapted:
    """A planner that has been trained on one task."""

    planner: TaskPlanner
    task: Task
    """As the planner was shown it."""
    steps: int
    """Training steps done."""
    seconds: float
    """Wall time of the training."""
    losses: tuple[float, ...]
    """Loss of every training step: nats per cell, those of the planning steps added up."""
    own_accuracy: float
    """Share of the cells of the task's own demonstrations right, at the end."""
    own_solved: float
    """Share of the task's own demonstrations right in every cell, at the end."""


def adapt(
    planner: QwenPlanner,
    task: Task,
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Adapted:
    """Train a copy of the planner on a task's demonstrations; the planner itself stays as it is.

    Args:
        planner: trained, or with random weights.
        task: its train pairs are used, outputs of test pairs never.
        settings: what to do.
        deadline: on `time.monotonic()`'s clock: no step begins after it.
        on_step: called after every step with its number, from 1, and its loss.
    """
    encoded = encode_task(planner, task, settings.symmetries)
    return adapt_agent(lines_agent(planner), encoded, narrowed(task), settings, deadline=deadline, on_step=on_step)


def adapt_agent(
    agent: GridAgent,
    encoded: tuple[Tensor, Tensor],
    task: Task,
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Adapted:
    """`adapt` to a task as it is, where Qwen has read it already.

    Args:
        agent: what to start from; it stays as it is.
        encoded: what `encode_task` made of the task.
        task, settings, deadline, on_step: as `adapt` takes them.
    """
    started = time.monotonic()
    ends = [t for t in (deadline, started + settings.task_seconds if settings.task_seconds else None) if t is not None]
    model = TaskPlanner(agent, *encoded)
    training = TrainingSet(task, settings, task_rng(settings, task.id))
    schedule = Schedule(settings, started, min(ends) if ends else None)
    optimizer = TaskOptimizer(list(model.named_parameters()), settings)
    norms = GroupGradNorm({"task": model.parameters()})
    average = Average(model, settings.average)
    step_weight = step_weights(model.agent.steps, settings.early_step_weight)
    size_weight = 0.0 if size_rule(task) else settings.size_weight
    losses: list[float] = []
    while (share := schedule.at(len(losses))) is not None:
        batch = training.batch()
        plan, sizes = model(batch)
        loss = plan_loss(plan, sizes, batch, step_weight, size_weight)
        loss.backward()
        norms.clip_(norms.measure(), settings.clip)
        optimizer.step(share)
        optimizer.zero_grad()
        average.update(len(losses))
        losses.append(loss.item())
        if on_step:
            on_step(len(losses), losses[-1])
    average.swap_in()
    accuracy, solved = own_accuracy(model, task)
    return Adapted(model, task, len(losses), time.monotonic() - started, tuple(losses), accuracy, solved)


class Schedule:
    """Learning rate over the steps, and when they end.

    Args:
        settings: steps, warmup and final_lr.
        started, end: on `time.monotonic()`'s clock; None where no time limit is.
    """

    def __init__(self, settings: SolveSettings, started: float, end: float | None):
        self.settings, self.started, self.end = settings, started, end

    def at(self, step: int) -> float | None:
        """Share of the learning rate of this step, from 0, or None where training is over."""
        settings = self.settings
        progress = step / max(settings.steps, 1)
        if self.end is not None:
            # whichever limit comes first ends the decay
            elapsed = time.monotonic() - self.started
            progress = max(progress, elapsed / max(self.end - self.started, 1e-9))
        if step >= settings.steps or progress >= 1:
            return None
        return min(1.0, (step + 1) / max(settings.warmup, 1)) * (1 - (1 - settings.final_lr) * progress)


class Average:
    """Exponential moving average of a model's parameters; with a decay of 0 the parameters themselves."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters: list[Tensor] = list(model.parameters())
        self.means = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after this step, from 0; early on the average is over fewer."""
        if self.means:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.means, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Give the model the average."""
        for parameter, mean in zip(self.parameters, self.means, strict=False):
            parameter.copy_(mean)


def step_weights(steps: int, early: float) -> Tensor:
    """[T] weight of each planning step's cross-entropy: 1 for the last."""
    weight = torch.full((steps,), early)
    weight[-1] = 1.0
    return weight


@torch.no_grad()
def own_accuracy(model: TaskPlanner, task: Task) -> tuple[float, float]:
    """Share of cells right, and of grids right, of the task's demonstrations as they are."""
    answers = [pair.output for pair in task.train]
    batch = examples([p.input for p in task.train], [a.shape for a in answers], [0] * len(answers), answers)  # type: ignore[union-attr,arg-type]
    plan, _ = model(batch, readouts=1)
    out = efe_loss(plan, batch.target, weights=None, hard_mode="none")  # type: ignore[arg-type]
    return float(out.accuracy.mean()), float(out.solved.double().mean())
