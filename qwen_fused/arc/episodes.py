"""Episodes and batches: leave pairs out, turn and recolour, pad to a common canvas. No grid is ever resized.

Axes: B episodes, H W canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.reader import SPLITS, load_tasks
from qwen_fused.arc.symmetry import SYMMETRIES, turn
from qwen_fused.arc.tasks import COLORS, MAX_SIDE, Pair, Task, TaskCollection

__all__ = [
    "COLORS",
    "IGNORE",
    "MAX_SIDE",
    "SPLITS",
    "Batch",
    "Episode",
    "Pair",
    "Task",
    "TaskCollection",
    "augment",
    "collate",
    "leave_one_out",
    "leave_out",
    "load_tasks",
    "test_episodes",
]

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Episode:
    """One question: demonstration pairs, a query grid, and the answer where it is known."""

    task_id: str
    demonstrations: tuple[Pair, ...]
    query: np.ndarray  # [h, w] uint8
    answer: np.ndarray | None  # [h, w] uint8
    index: int  # which pair of its task is the query

    def without_answer(self) -> Episode:
        """The same question with nothing of the answer in it."""
        return replace(self, answer=None)

    @property
    def side(self) -> int:
        """The longest side of query and answer: what the episode asks of a canvas."""
        return max(self.query.shape + (() if self.answer is None else self.answer.shape))

    def turn(self, symmetry: int) -> Episode:
        """Every grid turned in the same way, as `symmetry.turn` does."""
        return self.map_grids(lambda grid: turn(grid, symmetry))

    def map_grids(self, change: Callable[[np.ndarray], np.ndarray]) -> Episode:
        """Every grid changed in the same way; the new grids are read-only, as loaded ones are."""

        def apply(grid: np.ndarray) -> np.ndarray:
            changed = change(grid)
            changed.flags.writeable = False
            return changed

        def apply_known(grid: np.ndarray | None) -> np.ndarray | None:
            return None if grid is None else apply(grid)

        return replace(
            self,
            demonstrations=tuple(
                replace(pair, input=apply(pair.input), output=apply_known(pair.output)) for pair in self.demonstrations
            ),
            query=apply(self.query),
            answer=apply_known(self.answer),
        )


def test_episodes(tasks: Iterable[Task]) -> list[Episode]:
    """One episode per test input, demonstrated by all of the task's train pairs."""
    return [
        Episode(task.id, task.train, pair.input, pair.output, index)
        for task in tasks
        for index, pair in enumerate(task.test)
    ]


# the name starts as pytest's own do; without this, importing it into a test module would make it a test
test_episodes.__test__ = False  # type: ignore[attr-defined]


def leave_one_out(task: Task) -> list[Episode]:
    """One episode per train pair: that pair asks, the other ones demonstrate, test pairs stay unseen."""
    return [leave_out(task, (index,))[0] for index in range(len(task.train))]


def leave_out(task: Task, asked: Sequence[int]) -> tuple[Episode, ...]:
    """One episode per train pair in `asked`, all with the same demonstrations: the train pairs that nobody asks."""
    shown = tuple(pair for index, pair in enumerate(task.train) if index not in asked)
    return tuple(Episode(task.id, shown, task.train[k].input, task.train[k].output, k) for k in asked)


def augment(episodes: Sequence[Episode], rng: np.random.Generator) -> tuple[Episode, ...]:
    """Turn, mirror and recolour every grid of episodes with the same demonstrations, all in the same way.

    One of the 8 symmetries of the square, and a permutation of colours 1 to 9. Colour 0 stays: it is the
    background of nearly every task, and a rule told in terms of background should stay true.
    """
    symmetry = int(rng.integers(SYMMETRIES))
    recolor = np.arange(COLORS, dtype=np.uint8)
    recolor[1:] = 1 + rng.permutation(COLORS - 1)
    changed = [episode.map_grids(lambda grid: turn(recolor[grid], symmetry)) for episode in episodes]
    # one object for one set of demonstrations: a prompt window knows them by it
    return tuple(replace(episode, demonstrations=changed[0].demonstrations) for episode in changed)


@dataclass
class Batch:
    """Episodes side by side on one canvas, top left aligned."""

    episodes: list[Episode]
    query: Tensor  # [B, H, W] int64, IGNORE outside the grid
    target: Tensor  # [B, H, W] int64, IGNORE outside the grid and where there is no answer
    query_size: Tensor  # [B, 2] int64, height and width
    target_size: Tensor  # [B, 2] int64, zeros where there is no answer

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on another device."""
        names = ("query", "target", "query_size", "target_size")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the episodes, on the canvas of all."""
        names = ("episodes", "query", "target", "query_size", "target_size")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def collate(episodes: Sequence[Episode], *, canvas: tuple[int, int] | None = None) -> Batch:
    """Put episodes on one canvas.

    Args:
        episodes: at least one.
        canvas: height and width; by default the largest over queries and answers.

    Raises:
        ValueError: there is no episode, or a grid is larger than the canvas.
    """
    if not episodes:
        raise ValueError("episodes must hold at least one episode, got none")
    queries = [episode.query for episode in episodes]
    answers = [episode.answer for episode in episodes]
    present = [grid for grid in queries + answers if grid is not None]
    height, width = (max(grid.shape[axis] for grid in present) for axis in (0, 1))
    if canvas is None:
        canvas = (height, width)
    elif height > canvas[0] or width > canvas[1]:
        raise ValueError(f"canvas must hold every grid ({height}x{width}), got {canvas[0]}x{canvas[1]}")
    query, query_size = _on_canvas(queries, canvas)
    target, target_size = _on_canvas(answers, canvas)
    return Batch(list(episodes), query, target, query_size, target_size)


def _on_canvas(grids: Sequence[np.ndarray | None], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    cells = np.full((len(grids), *canvas), IGNORE, dtype=np.int64)
    sizes = np.zeros((len(grids), 2), dtype=np.int64)
    for number, grid in enumerate(grids):
        if grid is not None:
            h, w = grid.shape
            cells[number, :h, :w] = grid
            sizes[number] = h, w
    return torch.from_numpy(cells), torch.from_numpy(sizes)
