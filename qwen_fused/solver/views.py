"""Views of a task: a symmetry of the square and a permutation of colours, the same for every grid of it.

Colours have roles. One that is in every demonstration (the background, "the wall is grey") means something by itself,
and a planner that is shown it as another colour unlearns the rule. The others stand in for one another: the rule holds
whichever of them is there, and those alone are permuted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_fused.arc.episodes import COLORS, Task
from qwen_fused.arc.symmetry import swaps_sides, turn, turn_back


@dataclass(frozen=True, eq=False)
class View:
    """A symmetry (0..7) and a permutation of the colours."""

    symmetry: int
    colors: np.ndarray  # [10] uint8: what each colour becomes

    def apply(self, grid: np.ndarray) -> np.ndarray:
        """The grid [h, w] seen through the view."""
        return turn(self.colors[grid], self.symmetry)

    def undo(self, grid: np.ndarray) -> np.ndarray:
        """Inverse of `apply`."""
        return turn_back(np.argsort(self.colors).astype(np.uint8)[grid], self.symmetry)

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns after `apply`."""
        return (columns, rows) if swaps_sides(self.symmetry) else (rows, columns)


UNCHANGED = np.arange(COLORS, dtype=np.uint8)


def free_colors(task: Task) -> np.ndarray:
    """Colours that may take each other's place in a task, judged by its demonstrations.

    Fixed are 0, the colours in every pair and the colours that every output has. Where an output has a colour that
    neither its input nor every other output has, colours are mapped onto colours, and none is free.

    Returns:
        [n] uint8, sorted; empty where fewer than two are free.
    """
    inputs = [set(pair.input.ravel().tolist()) for pair in task.train]
    outputs = [set(pair.output.ravel().tolist()) for pair in task.train]  # type: ignore[union-attr]
    common = set.intersection(*outputs)
    fixed = {0} | common | set.intersection(*(a | b for a, b in zip(inputs, outputs, strict=True)))
    if len(task.train) == 1 or any(after - before - fixed for before, after in zip(inputs, outputs, strict=True)):
        return np.zeros(0, np.uint8)
    free = np.array(sorted(set(range(COLORS)) - fixed), np.uint8)
    return free if len(free) > 1 else np.zeros(0, np.uint8)


def permuted(colors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[10] uint8 permutation that moves the given colours among themselves, at random."""
    table = UNCHANGED.copy()
    table[colors] = rng.permutation(colors)
    return table
