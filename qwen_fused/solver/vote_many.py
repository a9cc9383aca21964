"""The votes of many tasks side by side: what `vote` and `own_accuracy` ask of one, of the planners of all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.episodes import Task
from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.solver.examples import canvas_of, examples, task_rng
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import Size, size_rule
from qwen_fused.solver.stacked import StackedPlanner
from qwen_fused.solver.views import View
from qwen_fused.solver.vote import Vote, count, likely_size, seen_back, voting_views


@dataclass(frozen=True, eq=False)
class Ask:
    """A query as a view sees it, the size of the answer as the view sees that, and the answer where it is known."""

    query: np.ndarray
    size: Size
    symmetry: int
    answer: np.ndarray | None = None


def vote_many(
    stacked: StackedPlanner, tasks: Sequence[Task], settings: SolveSettings, columns: int
) -> list[list[Vote]]:
    """Answer every test input of every task.

    Args:
        stacked: adapted to the tasks.
        tasks: of their test pairs only the inputs are read.
        settings: how many views vote.
        columns: episodes of a task that the device does at a time.
    """
    views = [voting_views(task, settings, task_rng(settings, f"{task.id}/vote")) for task in tasks]
    sizes = [answer_sizes(stacked, number, task, views[number]) for number, task in enumerate(tasks)]
    asks = [
        [
            Ask(view.apply(pair.input), view.size(*size), view.symmetry)
            for pair, size in zip(task.test, own_sizes, strict=True)
            for view in own_views
        ]
        for task, own_views, own_sizes in zip(tasks, views, sizes, strict=True)
    ]
    found = []
    for number, logits in enumerate(plan_many(stacked, asks, columns)):
        probabilities = iter(logits.softmax(1).cpu().numpy())
        answers = [[seen_back(next(probabilities), view, size) for view in views[number]] for size in sizes[number]]
        found.append([count(np.stack(seen)) for seen in answers])
    return found


def own_accuracies(stacked: StackedPlanner, tasks: Sequence[Task], columns: int) -> list[tuple[float, float]]:
    """Per task the share of cells right, and of grids right, of its demonstrations as they are."""
    asks = [[Ask(p.input, p.output.shape, 0, p.output) for p in task.train] for task in tasks]  # type: ignore[union-attr]
    shares = []
    for own, logits in zip(asks, plan_many(stacked, asks, columns), strict=True):
        target = examples(
            [a.query for a in own], [a.size for a in own], [0] * len(own), [a.answer for a in own],  # type: ignore[misc]
            (logits.shape[2], logits.shape[3]), logits.device,
        ).target  # fmt: skip
        out = efe_loss(logits[:, None], target, hard_mode="none")  # type: ignore[arg-type]
        shares.append(torch.stack([out.accuracy.double().mean(), out.solved.double().mean()]))
    return [(cells, grids) for cells, grids in torch.stack(shares).tolist()]


@torch.no_grad()
def plan_many(stacked: StackedPlanner, asks: Sequence[Sequence[Ask]], columns: int) -> list[Tensor]:
    """Logits [N, C, H, W] of the last planning step for each task's N queries, all on one canvas.

    Args:
        stacked: the planners of K tasks.
        asks: K, of different lengths, none empty.
        columns: queries of a task that the device does at a time.
    """
    device = stacked.prompts.device
    canvas = canvas_of([shape for own in asks for ask in own for shape in (ask.query.shape, ask.size)])
    rounds = []
    for first in range(0, max(map(len, asks)), columns):
        width = min(columns, max(map(len, asks)) - first)
        # a task that has no more asks its first again
        now = [own[k] if k < len(own) else own[0] for own in asks for k in range(first, first + width)]
        batch = examples(
            [ask.query for ask in now], [ask.size for ask in now], [ask.symmetry for ask in now], None, canvas, device
        )
        plan, _ = stacked(batch, 1)
        rounds.append(plan[:, :, -1])
    logits = torch.cat(rounds, 1)
    return [logits[number, : len(own)] for number, own in enumerate(asks)]


@torch.no_grad()
def answer_sizes(stacked: StackedPlanner, number: int, task: Task, views: Sequence[View]) -> list[Size]:
    """The size of every answer of a task: by its rule, or what its size head finds likeliest."""
    if rule := size_rule(task):
        return [rule(pair.input.shape) for pair in task.test]
    model = stacked.unstacked(number)
    return [likely_size(model, pair.input, views) for pair in task.test]
