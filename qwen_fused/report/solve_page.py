"""A solve as one self-contained page: every task with its grids, its attempts and how it learned, sortable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from qwen_fused.arc.scoring import cell_accuracy
from qwen_fused.common.files import write_atomic
from qwen_fused.report.curves import INK
from qwen_fused.report.draw_grids import ARC_COLORS, ERROR_COLORS, error_grid, grid_uri

# pixels of a loss curve, the range of its logarithmic axis in nats per cell, and points that are drawn
CURVE = (220, 56)
LOSSES = (3e-3, 3.0)
POINTS = 110
# confidence, from and below
BINS = ((0.9, 1.01), (0.7, 0.9), (0.5, 0.7), (0.3, 0.5), (0.0, 0.3))


@dataclass(frozen=True, eq=False)
class ShownTest:
    """One test input of a task; grids are [h, w] uint8."""

    query: np.ndarray
    attempts: tuple[np.ndarray, ...]
    answer: np.ndarray | None
    confidence: float

    @property
    def right(self) -> int | None:
        """Which attempt is the answer, from 1; 0 where none is, None where nobody knows."""
        if self.answer is None:
            return None
        found = [number for number, grid in enumerate(self.attempts, 1) if np.array_equal(grid, self.answer)]
        return found[0] if found else 0

    @property
    def verdict(self) -> str:
        """In words."""
        if self.answer is None:
            return "no answer known"
        if self.right:
            return f"attempt {self.right} is right"
        return f"{100 * cell_accuracy(self.attempts[0], self.answer):.1f} % of cells right"

    @property
    def errors(self) -> np.ndarray | None:
        """What became of each cell of the first attempt, where it is not right."""
        return None if self.answer is None or self.right == 1 else error_grid(self.attempts[0], self.answer)


@dataclass(frozen=True, eq=False)
class ShownTask:
    """One task, and what came of it."""

    task_id: str
    demonstrations: tuple[tuple[np.ndarray, np.ndarray], ...]
    tests: tuple[ShownTest, ...]
    confidence: float
    losses: tuple[float, ...]
    """Of each step of its training."""
    seconds: float
    steps: int
    own_solved: float
    """Share of its demonstrations right after training, NaN where it was not trained."""
    failed: str
    """Why its query stands in for an answer; empty where it has one."""
    cut: bool
    """The time for all tasks ended in the middle of it."""

    @property
    def state(self) -> str:
        """solved, unsolved, unknown or failed."""
        if self.failed:
            return "failed"
        if any(test.right is None for test in self.tests):
            return "unknown"
        return "solved" if all(test.right for test in self.tests) else "unsolved"

    @property
    def verdict(self) -> str:
        """In words."""
        words = {"solved": "✓ solved", "unsolved": "✗ not solved", "unknown": "answered", "failed": "no answer"}
        return words[self.state]

    @property
    def side(self) -> int:
        """The longest side of all its grids."""
        grids = [grid for pair in self.demonstrations for grid in pair]
        grids += [grid for test in self.tests for grid in (test.query, *test.attempts)]
        return max(side for grid in grids for side in grid.shape)

    @property
    def cell(self) -> int:
        """Pixels of a cell, one size for all grids of the task."""
        return int(np.clip(108 // self.side, 3, 16))

    @property
    def curve(self) -> str:
        """Points of its loss curve in an SVG of `CURVE` pixels."""
        return curve_points(self.losses)


def write_solve_page(
    path: Path,
    *,
    title: str,
    lead: Sequence[str],
    tiles: Sequence[Mapping[str, str]],
    sizes: Sequence[Mapping[str, Any]],
    tasks: Sequence[ShownTask],
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        title: heading.
        lead: sentences under it.
        tiles: label, figure and note of each.
        sizes: rows of `Solution.by_size`.
        tasks: the surest first is how they are shown at first, whatever their order here.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"uri": grid_uri, "seconds": lambda value: "–" if value is None else f"{value:.1f} s"}
    template = environment.from_string(resources.files("qwen_fused.report").joinpath("solve.html").read_text("utf-8"))
    page = template.render(
        title=title,
        lead=lead,
        tiles=tiles,
        sizes=sizes,
        bins=by_confidence(tasks),
        tasks=sorted(tasks, key=lambda task: (-task.confidence, task.task_id)),
        states=[state for state in ("solved", "unsolved", "unknown", "failed") if any(t.state == state for t in tasks)],
        curve=CURVE,
        light=INK,
        arc=ARC_COLORS,
        errors=ERROR_COLORS,
        arc_colors=["#" + bytes(color).hex() for color in ARC_COLORS],
        error_colors=["#" + bytes(color).hex() for color in ERROR_COLORS],
    )
    write_atomic(path, page)


def by_confidence(tasks: Sequence[ShownTask]) -> list[dict[str, Any]]:
    """For each range of confidence the tasks with known answers, and how many of them are solved."""
    rows = []
    for low, high in BINS:
        found = [task for task in tasks if low <= task.confidence < high and task.state in ("solved", "unsolved")]
        if found:
            solved = sum(task.state == "solved" for task in found)
            rows.append({"low": low, "high": min(high, 1.0), "tasks": len(found), "solved": solved})
    return rows


def curve_points(losses: Sequence[float]) -> str:
    """A loss curve as the points of an SVG polyline, on an axis that all tasks share."""
    width, height = CURVE
    low, high = map(math.log, LOSSES)
    # means of neighbours, so that no step is lost
    pieces = np.array_split(np.asarray(losses, dtype=float), min(POINTS, len(losses))) if losses else []
    values = [float(np.mean(piece)) for piece in pieces]
    points = []
    for number, value in enumerate(values):
        share = (math.log(min(max(value, LOSSES[0]), LOSSES[1])) - low) / (high - low) if value == value else 1.0
        x = width * (number + 0.5) / len(values)
        points.append(f"{x:.1f},{2 + (height - 4) * (1 - share):.1f}")
    return " ".join(points)
