"""A task's training set: its demonstration pairs through random views, in batches of one orientation.

Axes as in `qwen_fused.planner.agent`. Nothing here reads the output of a test pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.episodes import COLORS, IGNORE, Task
from qwen_fused.arc.symmetry import swaps_sides
from qwen_fused.planner.agent import Cells, describe_cells
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.views import UNCHANGED, View, free_colors, permuted


@dataclass
class Examples:
    """Grids side by side on one canvas, as the planner takes them."""

    cells: Cells
    symmetry: Tensor  # [B] int64, 0..7
    query_size: Tensor  # [B, 2] int64
    size: Tensor  # [B, 2] int64, rows and columns of the answer
    target: Tensor | None  # [B, H, W] int64, IGNORE outside the grid


def task_rng(settings: SolveSettings, task_id: str) -> np.random.Generator:
    """The generator that decides everything random about a task: the same for any number of workers."""
    digest = hashlib.sha256(f"{settings.seed}:{task_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def on_canvas(grids: Sequence[np.ndarray], height: int, width: int) -> Tensor:
    """Grids top left aligned: [B, H, W] int64, IGNORE outside."""
    canvas = np.full((len(grids), height, width), IGNORE, dtype=np.int64)
    for number, grid in enumerate(grids):
        canvas[number, : grid.shape[0], : grid.shape[1]] = grid
    return torch.from_numpy(canvas)


def examples(
    queries: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    symmetries: Sequence[int],
    answers: Sequence[np.ndarray] | None = None,
    canvas: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Examples:
    """Put queries, as seen through their views, on the smallest canvas that holds them and answers of the given sizes.

    Args:
        queries: B grids [h, w].
        sizes: rows and columns of each answer.
        symmetries: which symmetry each is seen through, 0..7.
        answers: B grids; without them there is no target.
        canvas: height and width, where several tasks share one.
        device: where they are to be; the CPU by default.
    """
    height, width = canvas or canvas_of([*(query.shape for query in queries), *sizes])
    query_size = torch.tensor([query.shape for query in queries]).to(device)
    size = torch.tensor(list(sizes)).to(device)
    cells = describe_cells(on_canvas(queries, height, width).to(device), query_size, size)
    target = None if answers is None else on_canvas(answers, height, width).to(device)
    return Examples(cells, torch.tensor(list(symmetries)).to(device), query_size, size, target)


def canvas_of(sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Height and width of the smallest canvas that holds grids of these sizes."""
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


class TrainingSet:
    """Batches of a task's demonstration pairs, each seen through a random view.

    Args:
        task: its train pairs are used and nothing else.
        settings: which views, and how many episodes a batch has.
        rng: decides order and views.
        colors_of: the task whose colours say which are permuted; by default this one.
    """

    def __init__(self, task: Task, settings: SolveSettings, rng: np.random.Generator, colors_of: Task | None = None):
        self.pairs = task.train
        self.settings, self.rng = settings, rng
        every = np.arange(1, COLORS, dtype=np.uint8)
        self.colors = {"free": free_colors(colors_of or task), "all": every, "none": every[:0]}[settings.recolor]
        square = all(side[0] == side[1] for p in self.pairs for side in (p.input.shape, p.output.shape))  # type: ignore[union-attr]
        symmetries = range(settings.symmetries)
        # a batch of one orientation has a canvas no larger than its grids
        halves = [[s for s in symmetries if swaps_sides(s) == turned] for turned in (False, True)]
        self.orientations = [list(symmetries)] if square else [half for half in halves if half]
        self.order: list[int] = []

    def view(self, symmetry: int) -> View:
        """A view with this symmetry, recoloured or not."""
        if len(self.colors) == 0 or self.rng.random() >= self.settings.recolored:
            return View(symmetry, UNCHANGED)
        return View(symmetry, permuted(self.colors, self.rng))

    def next_pair(self) -> int:
        """Pairs in random order, each as often as the others."""
        if not self.order:
            self.order = self.rng.permutation(len(self.pairs)).tolist()
        return self.order.pop()

    def draw(self) -> list[tuple[int, View]]:
        """The next batch: which pairs, and the view that each is seen through."""
        symmetries = self.orientations[int(self.rng.integers(len(self.orientations)))]
        return [
            (self.next_pair(), self.view(symmetries[int(self.rng.integers(len(symmetries)))]))
            for _ in range(self.settings.batch)
        ]

    def batch(self) -> Examples:
        """The next batch as the planner takes it."""
        drawn = [(self.pairs[pair], view) for pair, view in self.draw()]
        queries = [view.apply(pair.input) for pair, view in drawn]
        answers = [view.apply(pair.output) for pair, view in drawn]  # type: ignore[arg-type]
        return examples(queries, [answer.shape for answer in answers], [view.symmetry for _, view in drawn], answers)
