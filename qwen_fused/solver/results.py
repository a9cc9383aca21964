"""What came of a task, as a row of JSON that a stopped solve goes on from; and the answer where nothing came of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_fused.arc.scoring import ATTEMPTS
from qwen_fused.arc.tasks import Task, parse_grid
from qwen_fused.solver.task_solver import TaskAnswer


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A task's answer and how it came about; nothing of the task's own answers is in it."""

    answer: TaskAnswer
    question: str
    """`digest` of what was asked: a task that has changed since is asked again."""
    cut: bool = False
    """The time for all tasks ended in the middle of this one."""
    failed: str = ""
    """Why there is no answer and the query stands in for it; empty where there is one."""

    @property
    def final(self) -> bool:
        """A solve that goes on need not ask again."""
        return not self.cut and not self.failed

    @property
    def confidence(self) -> float:
        """Of the whole task, in [0, 1]: that of the test input it is least sure of."""
        return min(self.answer.confidence, default=0.0)

    def to_plain(self) -> dict[str, Any]:
        """The row as JSON takes it; what is not a number is null."""
        answer = self.answer
        return {
            "task": answer.task_id,
            "question": self.question,
            "attempts": [[grid.tolist() for grid in grids] for grids in answer.attempts],
            "confidence": [_known(value) or 0.0 for value in answer.confidence],
            "seconds": round(answer.seconds, 3),
            "steps": answer.steps,
            "own_accuracy": _known(answer.own_accuracy),
            "own_solved": _known(answer.own_solved),
            "losses": [_known(loss) for loss in answer.losses],
            "cut": self.cut,
            "failed": self.failed,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TaskResult:
        """Inverse of `to_plain`, to the six digits that it keeps.

        Raises:
            ValueError, KeyError, TypeError: it is no such row.
        """
        attempts = tuple(tuple(parse_grid(grid) for grid in grids) for grids in plain["attempts"])
        if not attempts or any(len(grids) != ATTEMPTS for grids in attempts):
            raise ValueError("a test input must have two attempts")
        answer = TaskAnswer(
            task_id=str(plain["task"]),
            attempts=attempts,
            confidence=tuple(float(value) for value in plain["confidence"]),
            seconds=float(plain["seconds"]),
            steps=int(plain["steps"]),
            losses=tuple(_number(loss) for loss in plain["losses"]),
            own_accuracy=_number(plain["own_accuracy"]),
            own_solved=_number(plain["own_solved"]),
        )
        return cls(answer, str(plain["question"]), bool(plain["cut"]), str(plain["failed"]))


def fallback(task: Task, failed: str = "", seconds: float = 0.0) -> TaskResult:
    """A copy of every query, for a task that got no answer."""
    attempts = tuple((pair.input,) * ATTEMPTS for pair in task.test)
    nothing = TaskAnswer(task.id, attempts, (0.0,) * len(attempts), seconds, 0, (), math.nan, math.nan)
    return TaskResult(nothing, digest(task), failed=failed)


def digest(task: Task) -> str:
    """What a task asks, as a hash: its demonstrations and test inputs, no test output."""
    grids = [grid for pair in task.train for grid in (pair.input, pair.output)] + [pair.input for pair in task.test]
    found = hashlib.sha256(f"{task.id}:{len(task.train)}".encode())
    for grid in grids:
        assert grid is not None, "demonstrations have outputs"
        found.update(f":{grid.shape}".encode() + np.ascontiguousarray(grid, dtype=np.uint8).tobytes())
    return found.hexdigest()[:16]


def _known(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
