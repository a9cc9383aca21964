"""Ask a model for answers to episodes whose answers it never sees, and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qwen_fused.arc.episodes import COLORS, MAX_SIDE, Episode
from qwen_fused.arc.scoring import ATTEMPTS, Evaluation, Record, score_episode
from qwen_fused.planner.evaluation_mode import evaluating


class Predictor(Protocol):
    """Anything that answers episodes: the trained model, or a function object in a test."""

    def predict(self, episodes: Sequence[Episode], attempts: int = ATTEMPTS) -> list[list[np.ndarray]]:
        """For each episode at least one grid and at most `attempts`, best first."""


def evaluate(
    model: Predictor,
    episodes: Sequence[Episode],
    *,
    batch_size: int = 16,
    on_done: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Ask for two attempts at every episode and score them.

    The model gets `episode.without_answer()` and batches that do not depend on any answer. If it is an nn.Module it
    runs in eval mode without gradients, and each of its modules has its own mode back afterwards.

    Args:
        model: see Predictor.
        episodes: with or without answers.
        batch_size: episodes in a call of predict.
        on_done: called with the number of episodes answered, after each batch.

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
            on_done(len(attempts))
    return Evaluation(
        tuple(
            Record(
                episode.task_id,
                episode.index,
                attempts[number],
                score_episode(attempts[number], episode),
                None if episode.answer is None else episode.answer.shape,
            )
            for number, episode in enumerate(episodes)
        )
    )


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
