"""`qwen-fused show TASK`: one task in the terminal and as a PNG, with a run's answers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwen_fused.arc.episodes import Task, test_episodes
from qwen_fused.arc.reader import load_tasks, splits_of
from qwen_fused.arc.scoring import cell_accuracy
from qwen_fused.common.typed_yaml import nearest
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.curves import to_png
from qwen_fused.report.draw_grids import ARC_COLORS, ERROR_COLORS, CaptionedGrid, draw_rows, error_grid


@dataclass(frozen=True)
class Row:
    """Captioned grids under one title."""

    title: str
    grids: list[CaptionedGrid]


def find_task(dataset: str, task_id: str) -> Task:
    """The task of that id, in any split of the dataset.

    Raises:
        ValueError: there is none; the message has the nearest id.
    """
    tasks: dict[str, Task] = {}
    sentences: list[str] = []
    # tasks that lie together are no split
    for split in splits_of(dataset) or (None,):
        loaded = load_tasks(dataset, split, min_pairs=1)
        sentences += loaded.skipped
        for task in loaded.tasks:
            # of two splits the one that knows the answers
            known = tasks.setdefault(task.id, task)
            tasks[task.id] = task if all(pair.output is None for pair in known.test) else known
    if task_id not in tasks:
        why = next((f": {sentence}" for sentence in sentences if f", task {task_id}:" in sentence), "")
        raise ValueError(
            f"task must be one of the {len(tasks)} tasks of {dataset}, got {task_id!r}{why or nearest(task_id, tasks)}"
        )
    return tasks[task_id]


def describe_task(task: Task, model: QwenPlanner | None = None) -> list[Row]:
    """Demonstrations, then each test input: with a model its plan and two attempts, the target, and the errors."""
    rows = []
    for number, pair in enumerate(task.train):
        grids: list[CaptionedGrid] = [("input", pair.input, ARC_COLORS)]
        if pair.output is not None:
            grids.append(("output", pair.output, ARC_COLORS))
        rows.append(Row(f"demonstration {number + 1}", grids))
    for episode in test_episodes([task]):
        grids = [("input", episode.query, ARC_COLORS)]
        title = f"test input {episode.index + 1}"
        if model is not None:
            first, second = model.predict([episode], attempts=2)[0]
            steps = model.plan_steps(episode)
            grids += [(f"step {number + 1}", grid, ARC_COLORS) for number, grid in enumerate(steps)]
            grids += [("attempt 1", first, ARC_COLORS), ("attempt 2", second, ARC_COLORS)]
            if episode.answer is not None:
                title += f": {_verdict([first, second], episode.answer)}"
        if episode.answer is not None:
            grids.append(("target", episode.answer, ARC_COLORS))
            if model is not None:
                grids.append(("errors", error_grid(first, episode.answer), ERROR_COLORS))
        rows.append(Row(title, grids))
    return rows


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Draw in the terminal, two columns to a cell; grids that don't fit side by side go below each other."""
    for row in rows:
        console.print(row.title, style="bold", markup=False)
        line: list[CaptionedGrid] = []
        width = 0
        for captioned in row.grids:
            needed = _width(captioned)
            if line and width + needed > console.width:
                console.print(_table(line))
                line, width = [], 0
            line.append(captioned)
            width += needed
        console.print(_table(line))


def write_png(path: Path, task: Task, rows: Sequence[Row]) -> None:
    """The same as a picture.

    Raises:
        ValueError: the file cannot be written.
    """
    titled = [(f"{task.id}  ·  {row.title}", row.grids) for row in rows]
    try:
        path.write_bytes(to_png(draw_rows(titled), dpi=110))
    except OSError as error:
        raise ValueError(f"png must be a file that can be written to, got {path}: {error.strerror}") from None


def _verdict(attempts: Sequence[np.ndarray], answer: np.ndarray) -> str:
    for number, grid in enumerate(attempts):
        if np.array_equal(grid, answer):
            return f"solved by attempt {number + 1}"
    return f"{100 * cell_accuracy(attempts[0], answer):.1f} % of cells right"


def _table(line: Sequence[CaptionedGrid]) -> Padding:
    table = Table.grid(padding=(0, 3, 0, 0))
    for _ in line:
        table.add_column(vertical="bottom")
    table.add_row(*(_cells(grid, colors) for _, grid, colors in line))
    table.add_row(*(Text(_caption(captioned), style="dim") for captioned in line))
    return Padding(table, (0, 0, 1, 0))


def _cells(grid: np.ndarray, colors: np.ndarray) -> Text:
    """Two spaces on the cell's colour; the digit besides, for terminals without colours and for eyes without them."""
    text = Text()
    for row in grid:
        for cell in row:
            red, green, blue = (int(channel) for channel in colors[cell][:3])
            # dark digits on light cells
            ink = "black" if 299 * red + 587 * green + 114 * blue > 128_000 else "white"
            text.append(f"{cell} ", style=f"{ink} on rgb({red},{green},{blue})")
        text.append("\n")
    text.right_crop(1)
    return text


def _caption(captioned: CaptionedGrid) -> str:
    caption, grid, _ = captioned
    return f"{caption} {grid.shape[0]}x{grid.shape[1]}"


def _width(captioned: CaptionedGrid) -> int:
    return max(2 * captioned[1].shape[1], len(_caption(captioned))) + 3
