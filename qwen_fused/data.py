"""Episodes and batches: leave one pair out, turn and recolour, group by size, pad to a common canvas.

Everything random is drawn from (seed, epoch, place in the epoch) and from nothing else, so a run that stops
after any batch goes on with the next one without having saved a generator. No grid is ever resized.

Axes: B episodes, H W canvas.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qwen_fused.symmetry import SYMMETRIES, map_grids, turn
from qwen_fused.tasks import COLORS, MAX_SIDE, SPLITS, Pair, Task, TaskCollection, load_tasks

__all__ = [
    "COLORS",
    "IGNORE",
    "MAX_SIDE",
    "SPLITS",
    "Batch",
    "Episode",
    "EpisodeSampler",
    "Pair",
    "Task",
    "TaskCollection",
    "augment",
    "collate",
    "leave_one_out",
    "load_tasks",
    "shared_tasks",
    "split_tasks",
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


def split_tasks(tasks: Iterable[Task], fraction: float, seed: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Divide whole tasks into training and held-out ones.

    Tasks are ranked by a hash of seed and id, so the order of loading changes nothing, and a task that comes
    or goes moves hardly any other.

    Args:
        tasks: tasks with different ids.
        fraction: share to hold out, in [0, 1); rounded to whole tasks, at least one unless it is 0.
        seed: which division.

    Returns:
        (training, held-out), each sorted by id.

    Raises:
        ValueError: an id comes twice, the fraction is out of range, or no training task would remain.
    """
    tasks = sorted(tasks, key=lambda task: task.id)
    twice = [task_id for task_id, count in Counter(task.id for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(f"tasks must have different ids, got {twice[0]} more than once")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    count = max(1, round(fraction * len(tasks))) if fraction else 0
    if count >= len(tasks):
        raise ValueError(f"holding out {count} of {len(tasks)} tasks leaves none to train on")
    # python's own hash() differs from process to process
    ranked = sorted(tasks, key=lambda task: hashlib.sha256(f"{seed}:{task.id}".encode()).digest())
    held_out = {task.id for task in ranked[:count]}
    return (
        tuple(task for task in tasks if task.id not in held_out),
        tuple(task for task in tasks if task.id in held_out),
    )


def shared_tasks(training: Iterable[Task], evaluation: Iterable[Task]) -> tuple[str, ...]:
    """Ids of evaluation tasks that have a pair in common with the training tasks, under whatever name.

    Scores on them say nothing: of ARC-AGI-1's 400 evaluation tasks 376 are in ARC-AGI-2's training set, and one
    is in ARC-AGI-1's own (070dd51e, there called 40853293).
    """

    def pairs_of(task: Task) -> set[tuple]:
        known = ((pair.input, pair.output) for pair in task.train + task.test if pair.output is not None)
        return {(a.shape, a.tobytes(), b.shape, b.tobytes()) for a, b in known}

    seen = set().union(*map(pairs_of, training))
    return tuple(sorted(task.id for task in evaluation if pairs_of(task) & seen))


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
    return [
        Episode(task.id, task.train[:index] + task.train[index + 1 :], pair.input, pair.output, index)
        for index, pair in enumerate(task.train)
    ]


def augment(episode: Episode, rng: np.random.Generator) -> Episode:
    """Turn, mirror and recolour every grid of an episode in the same way.

    One of the 8 symmetries of the square, and a permutation of colours 1 to 9. Colour 0 stays: it is the
    background of nearly every task, and a rule told in terms of background should stay true.
    """
    symmetry = int(rng.integers(SYMMETRIES))
    recolor = np.arange(COLORS, dtype=np.uint8)
    recolor[1:] = 1 + rng.permutation(COLORS - 1)
    return map_grids(episode, lambda grid: turn(recolor[grid], symmetry))


class EpisodeSampler:
    """Batches of leave-one-out episodes: each pair of each task is the query once per epoch.

    Episodes of one size share a batch, since a batch is as large as its largest grid. Batches hold
    `batch_size` episodes except the last of an epoch, which takes what is left over.

    Args:
        tasks: tasks to train on.
        batch_size: episodes in a batch.
        seed: with the epoch and the place in it, decides everything.
        augment: share of the episodes, in [0, 1], that are turned and recoloured.

    Raises:
        ValueError: there is no task, or a number is out of range.
    """

    def __init__(self, tasks: Iterable[Task], *, batch_size: int, seed: int, augment: float = 1.0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= augment <= 1:
            raise ValueError(f"augment must be in [0, 1], got {augment}")
        # sorted, so that the order of loading does not change the batches
        ordered = sorted(tasks, key=lambda task: task.id)
        self.episodes = [episode for task in ordered for episode in leave_one_out(task)]
        if not self.episodes:
            raise ValueError("the sampler needs at least one task with train pairs, got none")
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def batches_per_epoch(self) -> int:
        """How many batches one epoch has, the smaller last one included."""
        return -(-len(self.episodes) // self.batch_size)

    def batch(self, epoch: int, index: int) -> list[Episode]:
        """The episodes of one batch, the same whenever it is asked for.

        Raises:
            ValueError: the epoch is negative or has no such batch.
        """
        if epoch < 0 or not 0 <= index < self.batches_per_epoch():
            raise ValueError(
                f"epoch {epoch} has no batch {index}; epochs count from 0 and have {self.batches_per_epoch()}"
            )
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        chosen = [self.episodes[number] for number in self._planned[1][index]]
        first = index * self.batch_size
        # 0 is the plan's stream (see _plan), so places count from 1
        places = range(1 + first, 1 + first + len(chosen))
        rngs = (np.random.default_rng([self.seed, epoch, place]) for place in places)
        return [
            augment(episode, rng) if rng.random() < self.augment else episode
            for episode, rng in zip(chosen, rngs, strict=True)
        ]

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Episode numbers of every batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        # within one size, a task's episodes are spread evenly from a random start: neighbours differ in task
        per_group = Counter((episode.side, episode.task_id) for episode in self.episodes)
        start = {group: rng.random() for group in per_group}
        seen: Counter[tuple[int, str]] = Counter()
        keys = np.empty(len(self.episodes))
        for number in rng.permutation(len(self.episodes)):
            episode = self.episodes[number]
            group = (episode.side, episode.task_id)
            keys[number] = episode.side + (seen[group] + start[group]) / per_group[group]
            seen[group] += 1
        order = np.argsort(keys, kind="stable")

        # the short batch is cut at a random size, or the largest grids would always be the ones in it
        full, rest = divmod(len(order), self.batch_size)
        cut = int(rng.integers(full + 1)) * self.batch_size
        short, long = order[cut : cut + rest], np.concatenate([order[:cut], order[cut + rest :]])
        batches = list(long.reshape(full, self.batch_size)[rng.permutation(full)])
        return batches + [short] if rest else batches


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


def collate(episodes: Sequence[Episode], *, canvas: tuple[int, int] | None = None) -> Batch:
    """Put episodes on one canvas.

    Args:
        episodes: at least one.
        canvas: height and width; by default the largest over queries and answers.

    Raises:
        ValueError: there is no episode, or a grid is larger than the canvas.
    """
    if not episodes:
        raise ValueError("collate needs at least one episode, got none")
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
