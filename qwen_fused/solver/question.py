"""What a worker process is asked: a task without its answers, with what Qwen made of its demonstrations.

Qwen stays with whoever asks: a worker holds the agent, a few megabytes, however large Qwen is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen_fused.arc.symmetry import turn
from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.solver.settings import SolveSettings


@dataclass(frozen=True, eq=False)
class Question:
    """A task without its answers, and what Qwen made of its demonstrations through each symmetry."""

    task: Task
    prompts: np.ndarray  # [V, D] float32
    features: np.ndarray  # [V, 15] float32
    seconds: float | None = None
    """Until the time for all tasks ends; None: it does not."""


@dataclass(frozen=True, eq=False)
class Job:
    """What all questions have in common."""

    agent: torch.nn.Module
    settings: SolveSettings


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts [V, D] and features [V, 15], as `QwenPrompt` gives them."""

    prompt: torch.Tensor
    features: torch.Tensor


class ReadPlanner:
    """Stands for the planner whose Qwen has read the demonstrations already."""

    def __init__(self, agent: torch.nn.Module, question: Question):
        self.agent = agent
        self.encoded = Encoded(torch.from_numpy(question.prompts), torch.from_numpy(question.features))

    def prompt(self, demonstrations: Any) -> Encoded:
        """What Qwen made of the question's demonstrations."""
        return self.encoded


def make_question(planner: Any, task: Task, settings: SolveSettings) -> Question:
    """Have Qwen read a task's demonstrations through each symmetry.

    Args:
        planner: a `QwenPlanner`.
        task: its answers are left out of the question.
        settings: how many symmetries.
    """
    with evaluating(planner):
        encoded = planner.prompt([turned_pairs(task.train, symmetry) for symmetry in range(settings.symmetries)])
    return Question(without_answers(task), encoded.prompt.float().cpu().numpy(), encoded.features.float().cpu().numpy())


def turned_pairs(pairs: Sequence[Pair], symmetry: int) -> tuple[Pair, ...]:
    """Demonstrations through a symmetry."""
    return tuple(Pair(turn(pair.input, symmetry), turn(pair.output, symmetry)) for pair in pairs)  # type: ignore[arg-type]


def without_answers(task: Task) -> Task:
    """The task as it is asked: no test pair has an output."""
    return replace(task, test=tuple(Pair(pair.input, None) for pair in task.test))
