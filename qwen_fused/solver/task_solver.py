"""A task from its demonstrations to its answers: adapt, then vote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_fused.arc.episodes import Task
from qwen_fused.solver.adapt import adapt
from qwen_fused.solver.examples import task_rng
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.vote import vote

if TYPE_CHECKING:
    from qwen_fused.planner.model import QwenPlanner


@dataclass(frozen=True, eq=False)
class TaskAnswer:
    """Answers to all test inputs of a task, and how they came about."""

    task_id: str
    attempts: tuple[tuple[np.ndarray, ...], ...]
    """Per test input two grids [h, w] uint8, the likelier first."""
    confidence: tuple[float, ...]
    """Per test input, in [0, 1]."""
    seconds: float
    """Wall time of the training."""
    steps: int
    """Training steps done."""
    losses: tuple[float, ...]
    """Loss of every training step, as `Adapted` has it."""
    own_accuracy: float
    """Share of the cells of the task's own demonstrations right after training."""
    own_solved: float
    """Share of the task's own demonstrations right in every cell after training."""


def solve_task(
    planner: QwenPlanner,
    task: Task,
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TaskAnswer:
    """Train a copy of the planner on the task's demonstrations and answer its test inputs.

    Args:
        planner, task, settings, deadline, on_step: as `adapt` takes them.
    """
    adapted = adapt(planner, task, settings, deadline=deadline, on_step=on_step)
    votes = vote(adapted.planner, adapted.task, settings, task_rng(settings, f"{task.id}/vote"))
    return TaskAnswer(
        task.id,
        tuple(v.attempts for v in votes),
        tuple(v.confidence for v in votes),
        adapted.seconds,
        adapted.steps,
        adapted.losses,
        adapted.own_accuracy,
        adapted.own_solved,
    )
