"""From an adapted planner to two attempts: every view of the query gives a grid, and whole grids are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen_fused.arc.episodes import Task
from qwen_fused.arc.symmetry import swaps_sides, turn_back
from qwen_fused.planner.attempts import further_attempts
from qwen_fused.solver.examples import examples
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.task_planner import TaskPlanner
from qwen_fused.solver.views import UNCHANGED, View, free_colors, permuted

ATTEMPTS = 2


@dataclass(frozen=True, eq=False)
class Vote:
    """The answer to one test input."""

    attempts: tuple[np.ndarray, ...]
    """Two grids [h, w] uint8, the likelier first."""
    confidence: float
    """In [0, 1]: share of the voices that gave the first attempt, times its mean probability of a cell."""


def vote(model: TaskPlanner, task: Task, settings: SolveSettings, rng: np.random.Generator) -> list[Vote]:
    """Answer every test input of a task.

    Args:
        model: adapted to the task.
        task: of its test pairs only the inputs are read.
        settings: how many views vote.
        rng: decides the recoloured views.
    """
    views = voting_views(task, settings, rng)
    rule = size_rule(task)
    answers = []
    for pair in task.test:
        size = rule(pair.input.shape) if rule else likely_size(model, pair.input, views)
        answers.append(count(cell_probabilities(model, pair.input, size, views)))
    return answers


def voting_views(task: Task, settings: SolveSettings, rng: np.random.Generator) -> list[View]:
    """The symmetries with colours as they are, then with free colours permuted."""
    colors = free_colors(task) if settings.recolor != "none" else UNCHANGED[:0]
    views = [View(symmetry, UNCHANGED) for symmetry in range(settings.symmetries)][: settings.votes]
    while len(colors) and len(views) < settings.votes:
        views.append(View(len(views) % settings.symmetries, permuted(colors, rng)))
    return views


@torch.no_grad()
def likely_size(model: TaskPlanner, query: np.ndarray, views: Sequence[View]) -> tuple[int, int]:
    """The size that the size head finds likeliest over the views with colours as they are."""
    symmetries = sorted({view.symmetry for view in views})
    seen = [View(symmetry, UNCHANGED).size(*query.shape) for symmetry in symmetries]
    prompt = (model.prompts + model.offset)[symmetries]
    query_size = torch.tensor(seen, device=prompt.device)
    log_p = model.agent.size_head(prompt, query_size, model.demo_sizes[symmetries]).log_softmax(2)
    upright = [log_p[k].flip(0) if swaps_sides(symmetry) else log_p[k] for k, symmetry in enumerate(symmetries)]
    rows, columns = (torch.stack(upright).sum(0).argmax(1) + 1).tolist()
    return rows, columns


@torch.no_grad()
def cell_probabilities(
    model: TaskPlanner, query: np.ndarray, size: tuple[int, int], views: Sequence[View]
) -> np.ndarray:
    """Colour probabilities [V, C, h, w] of the answer as each view sees it, turned and coloured back."""
    found: list[np.ndarray | None] = [None] * len(views)
    for turned in (False, True):
        chosen = [number for number, view in enumerate(views) if swaps_sides(view.symmetry) == turned]
        if not chosen:
            continue
        seen = [views[number] for number in chosen]
        batch = examples(
            [view.apply(query) for view in seen], [view.size(*size) for view in seen], [view.symmetry for view in seen]
        )
        plan, _ = model(batch, readouts=1)
        probability = plan[:, -1].softmax(1).numpy()
        for number, view, p in zip(chosen, seen, probability, strict=True):
            found[number] = seen_back(p, view, size)
    return np.stack([p for p in found if p is not None])


def seen_back(probability: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """Probabilities [C, H, W] on a canvas as a view sees them: the answer's [C, h, w], turned and coloured back."""
    h, w = view.size(*size)
    return turn_back(probability[view.colors, :h, :w], view.symmetry)


def count(probabilities: np.ndarray) -> Vote:
    """Two attempts from [V, C, h, w]: the grids with most votes, ties by the mean log-probability of their cells."""
    grids = probabilities.argmax(1).astype(np.uint8)
    mean = probabilities.mean(0)
    votes: dict[bytes, int] = {}
    kinds: dict[bytes, np.ndarray] = {}
    for grid in grids:
        votes[grid.tobytes()] = votes.get(grid.tobytes(), 0) + 1
        kinds[grid.tobytes()] = grid
    # the mean has a voice too: where every view is alone with its answer, the majority of each cell may be right
    merged = mean.argmax(0).astype(np.uint8)
    kinds.setdefault(merged.tobytes(), merged)
    votes[merged.tobytes()] = votes.get(merged.tobytes(), 0) + 1

    def likelihood(grid: np.ndarray) -> float:
        return float(np.log(np.take_along_axis(mean, grid[None].astype(np.int64), 0) + 1e-9).mean())

    ranked = sorted(kinds, key=lambda key: (votes[key], likelihood(kinds[key])), reverse=True)
    first = kinds[ranked[0]]
    second = kinds[ranked[1]] if len(ranked) > 1 else further_attempts(mean, first, 1)[0]
    agreement = votes[ranked[0]] / (len(grids) + 1)
    return Vote((first, second), agreement * float(np.exp(likelihood(first))))
