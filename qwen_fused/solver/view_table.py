"""The demonstrations of many tasks on their device, through every symmetry: a batch is then a few numbers an episode.

Who draws is `TrainingSet`, on the host and with each task's own generator, so that a task sees the same episodes beside
others as alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.episodes import COLORS, IGNORE, Task
from qwen_fused.planner.agent import describe_cells
from qwen_fused.solver.examples import Examples, TrainingSet, canvas_of
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.views import UNCHANGED, View

# of the colour tables: what a cell outside of the grid becomes is behind the colours
OUTSIDE = COLORS
# numbers that say what an episode is: its place in the table, its symmetry, and what each colour becomes
WIDTH = 2 + COLORS


class ViewTable:
    """Grids [N, 2, H, W] of N = tasks x pairs x symmetries: queries and answers on one canvas.

    Args:
        tasks: K, of which the train pairs are used.
        settings: which symmetries are trained on.
        device: where the grids are to be.
    """

    def __init__(self, tasks: Sequence[Task], settings: SolveSettings, device: torch.device):
        views = [View(symmetry, UNCHANGED) for symmetry in range(settings.symmetries)]
        self.symmetries, self.pairs = len(views), max(len(task.train) for task in tasks)
        # tasks with fewer pairs than others have holes, which are never drawn
        seen = {
            self.place(number, place, view.symmetry): (view.apply(pair.input), view.apply(pair.output))  # type: ignore[arg-type]
            for number, task in enumerate(tasks)
            for place, pair in enumerate(task.train)
            for view in views
        }
        self.canvas = canvas_of([grid.shape for grids in seen.values() for grid in grids])
        places = len(tasks) * self.pairs * self.symmetries
        grids = np.full((places, 2, *self.canvas), OUTSIDE, dtype=np.uint8)
        sizes = np.ones((places, 2, 2), dtype=np.int64)
        for place, sides in seen.items():
            for side, grid in enumerate(sides):
                grids[place, side, : grid.shape[0], : grid.shape[1]] = grid
                sizes[place, side] = grid.shape
        self.grids, self.sizes = torch.from_numpy(grids).to(device), torch.from_numpy(sizes).to(device)

    def place(self, task: int, pair: int, symmetry: int) -> int:
        """Where a pair through a symmetry is."""
        return (task * self.pairs + pair) * self.symmetries + symmetry

    def draw(self, training: Sequence[TrainingSet], into: np.ndarray) -> None:
        """Write the next batch of every task.

        Args:
            training: K of them.
            into: [K, B, WIDTH] int64.
        """
        for number, one in enumerate(training):
            for row, (pair, view) in zip(into[number], one.draw(), strict=True):
                row[0], row[1] = self.place(number, pair, view.symmetry), view.symmetry
                row[2:] = view.colors

    def drawn(self, training: Sequence[TrainingSet]) -> np.ndarray:
        """The next batch of every task, [K, B, WIDTH] int64."""
        into = np.zeros((len(training), training[0].settings.batch, WIDTH), dtype=np.int64)
        self.draw(training, into)
        return into

    def examples(self, drawn: Tensor) -> Examples:
        """K*B episodes, task by task, from what `draw` wrote [K, B, WIDTH]; nothing is read by the host."""
        place, symmetry, colors = drawn.flatten(0, 1).split([1, 1, COLORS], 1)
        table = torch.nn.functional.pad(colors, (0, 1), value=IGNORE)
        grids = self.grids[place[:, 0]]
        seen = table.gather(1, grids.flatten(1).long()).view(grids.shape)
        query_size, size = self.sizes[place[:, 0]].unbind(1)
        query, target = seen.unbind(1)
        return Examples(describe_cells(query, query_size, size), symmetry[:, 0], query_size, size, target)
