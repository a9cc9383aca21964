"""What came of all tasks: scores where answers are known, and by the size of the grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_fused.arc.episodes import test_episodes
from qwen_fused.arc.scoring import Evaluation, Record, score_episode, write_submission
from qwen_fused.arc.tasks import Task
from qwen_fused.common.files import write_atomic
from qwen_fused.solver.results import TaskResult, fallback

# longest side of a task's grids, first and last
SIZES = ((1, 10), (11, 20), (21, 30))


@dataclass(frozen=True, eq=False)
class Solution:
    """Answers to tasks."""

    tasks: tuple[Task, ...]
    results: Mapping[str, TaskResult]
    """By task id; a task that is not in it has not been answered."""
    folder: Path | None = None
    """Where submission.json, score.json, results.jsonl and solve.html are; None where nothing was written."""

    @cached_property
    def evaluation(self) -> Evaluation:
        """A record per test input, scored where its answer is known; a task without an answer counts with its query."""
        return Evaluation(tuple(record for task in self.tasks for record in score_task(task, self.result(task))))

    def result(self, task: Task) -> TaskResult:
        """What came of a task, or the query in its place.

        Args:
            task: one of `tasks`.
        """
        return self.results.get(task.id) or fallback(task, "it was not reached")

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Ids of the tasks that got the query for an answer."""
        return tuple(task.id for task in self.tasks if self.result(task).failed)

    @property
    def seconds(self) -> float:
        """Mean seconds of a worker for a task that was answered, NaN where none was."""
        return mean([r.answer.seconds for task in self.tasks if not (r := self.result(task)).failed])

    def by_size(self) -> list[dict[str, Any]]:
        """For each size of grids that there is: sides, tasks, scored and solved ones, mean seconds; ready for JSON."""
        solved = set(self.evaluation.solved_tasks)
        unknown = {record.task_id for record in self.evaluation.records if record.score is None}
        rows = []
        for first, last in SIZES:
            tasks = [task for task in self.tasks if first <= longest_side(task) <= last]
            seconds = mean([self.result(task).answer.seconds for task in tasks if not self.result(task).failed])
            ids = {task.id for task in tasks}
            row = {"sides": [first, last], "tasks": len(ids), "scored": len(ids - unknown), "solved": len(ids & solved)}
            rows.append({**row, "seconds": round(seconds, 3) if seconds == seconds else None})
        return [row for row in rows if row["tasks"]]

    def to_dict(self) -> dict[str, Any]:
        """score.json: the evaluation's summary, the sizes, and each task's share of test inputs right or null."""
        return {
            **self.evaluation.summary(),
            "unanswered": list(self.unanswered),
            "seconds_a_task": round(self.seconds, 3) if self.seconds == self.seconds else None,
            "sizes": self.by_size(),
            "by_task": self.evaluation.by_task(),
        }

    def write_submission(self, path: Path) -> None:
        """Every task's two attempts in the official format.

        Args:
            path: file to write.
        """
        attempts = {
            (task.id, index): grids
            for task in self.tasks
            for index, grids in enumerate(self.result(task).answer.attempts)
        }
        write_submission(path, self.tasks, attempts)

    def write_score(self, path: Path) -> None:
        """`to_dict` as JSON.

        Args:
            path: file to write.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")


def score_task(task: Task, result: TaskResult) -> list[Record]:
    """The records of a task: here its answers are read for the first time."""
    return [
        Record(
            task.id, episode.index, attempts, score_episode(attempts, episode),
            None if episode.answer is None else episode.answer.shape,
        )
        for episode, attempts in zip(test_episodes([task]), result.answer.attempts, strict=True)
    ]  # fmt: skip


def longest_side(task: Task) -> int:
    """Of demonstrations and test inputs; answers are not asked."""
    return max(canvas(task))


def canvas(task: Task) -> tuple[int, int]:
    """Rows and columns that hold every grid but the answers."""
    grids = [g for pair in task.train for g in (pair.input, pair.output)] + [pair.input for pair in task.test]
    shapes = [grid.shape for grid in grids if grid is not None]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def mean(values: Sequence[float]) -> float:
    """Of no values NaN."""
    return sum(values) / len(values) if values else float("nan")
