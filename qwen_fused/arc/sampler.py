"""The order in which episodes train: like sizes together, and prompts that several batches of a window share.

Everything random is drawn from (seed, epoch, place in the epoch) and from nothing else, so a run that stops
after any batch goes on with the next one without having saved a generator.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from qwen_fused.arc.episodes import Episode, Task, augment, leave_out

# pairs a task must have for two of them to be asked under one prompt: at least two then still demonstrate
MIN_PAIRS_FOR_TWO_QUERIES = 4


class EpisodeSampler:
    """Batches of episodes that leave train pairs out.

    Episodes of one size share a batch, since a batch is as large as its largest grid. Batches hold
    `batch_size` episodes except one of each pass over the data, which takes what is left over.

    With window = 1 each pair of each task is the query once per epoch. With a larger window its batches come from a
    pool: `window / visits` batches' worth of prompts, drawn in the same order, which take turns and are each visited
    about `visits` times. A task of four pairs or more leaves two out, which ask in turns under the same prompt. An
    epoch has as many batches either way, and so passes over 1 / visits of the pairs.

    Args:
        tasks: tasks to train on.
        batch_size: episodes in a batch.
        seed: with the epoch and the place in it, decides everything.
        augment: share of the prompts, in [0, 1], that are turned and recoloured.
        window: batches that share a pool of prompts; windows do not cross epochs.
        visits: how often a prompt is used within its window.

    Raises:
        ValueError: there is no task, or a number is out of range.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        batch_size: int,
        seed: int,
        augment: float = 1.0,
        window: int = 1,
        visits: int = 1,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("window", window, 1), ("visits", visits, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= augment <= 1:
            raise ValueError(f"augment must be in [0, 1], got {augment}")
        # sorted, so that the order of loading does not change the batches
        self.tasks = sorted(tasks, key=lambda task: task.id)
        self.queries = [(task, index) for task in self.tasks for index in range(len(task.train))]
        if not self.queries:
            raise ValueError("tasks must hold at least one task with train pairs, got none")
        self.sides = [leave_out(task, (index,))[0].side for task, index in self.queries]
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.window, self.visits = window, min(visits, window)
        self.pool = -(-window // self.visits)
        self._batch_orders: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._drawn: OrderedDict[int, list[tuple[Episode, ...]]] = OrderedDict()

    def batches_per_epoch(self) -> int:
        """How many batches one epoch has, the smaller last one included."""
        return -(-len(self.queries) // self.batch_size)

    def ends_window(self, index: int) -> bool:
        """Whether batch `index` of an epoch is the last of its window."""
        return (index + 1) % self.window == 0 or index + 1 == self.batches_per_epoch()

    def window_start(self, index: int) -> int:
        """The first batch of the window that batch `index` of an epoch is in."""
        return index - index % self.window

    def batch(self, epoch: int, index: int) -> list[Episode]:
        """The episodes of one batch, the same whenever it is asked for.

        Raises:
            ValueError: the epoch is negative or has no such batch.
        """
        batches = self.batches_per_epoch()
        if epoch < 0 or not 0 <= index < batches:
            raise ValueError(f"epoch {epoch} has no batch {index}; epochs count from 0 and have {batches}")
        window, place = divmod(index, self.window)
        whole, rest = divmod(batches, self.window)
        pool = min(self.pool, rest) if window == whole else self.pool
        drawn_per_epoch = whole * self.pool + min(self.pool, rest)
        drawn = self._draw_batch(epoch * drawn_per_epoch + window * self.pool + place % pool)
        return [episodes[place // pool % len(episodes)] for episodes in drawn]

    def _draw_batch(self, number: int) -> list[tuple[Episode, ...]]:
        """Batch `number` of the endless passes over all pairs: per prompt the episodes that it serves."""
        if number in self._drawn:
            return self._drawn[number]
        sweep, index = divmod(number, self.batches_per_epoch())
        chosen = self._batch_order(sweep)[index]
        # 0 is the stream of the order (see _batch_order), so places count from 1
        first = 1 + index * self.batch_size
        drawn = [self._episodes(int(k), [self.seed, sweep, first + i]) for i, k in enumerate(chosen)]
        self._drawn[number] = drawn
        # the same objects for as long as their window lasts
        while len(self._drawn) > self.pool:
            self._drawn.popitem(last=False)
        return drawn

    def _episodes(self, number: int, stream: list[int]) -> tuple[Episode, ...]:
        """The episodes of one prompt: of a pair, and of a second one where the prompt is used again."""
        task, index = self.queries[number]
        rng = np.random.default_rng(stream)
        turned = rng.random() < self.augment
        asked = [index]
        if self.visits > 1 and len(task.train) >= MIN_PAIRS_FOR_TWO_QUERIES:
            second = int(rng.integers(len(task.train) - 1))
            asked.append(second + (second >= index))
        episodes = leave_out(task, asked)
        return augment(episodes, rng) if turned else episodes

    def _batch_order(self, sweep: int) -> list[np.ndarray]:
        """Numbers of the pairs of every batch of one pass over them all."""
        if sweep in self._batch_orders:
            return self._batch_orders[sweep]
        rng = np.random.default_rng([self.seed, sweep, 0])
        # within one size, a task's episodes are spread evenly from a random start: neighbours differ in task
        per_group = Counter((side, task.id) for side, (task, _) in zip(self.sides, self.queries, strict=True))
        start = {group: rng.random() for group in per_group}
        seen: Counter[tuple[int, str]] = Counter()
        keys = np.empty(len(self.queries))
        for number in rng.permutation(len(self.queries)):
            side = self.sides[number]
            group = (side, self.queries[number][0].id)
            keys[number] = side + (seen[group] + start[group]) / per_group[group]
            seen[group] += 1
        order = np.argsort(keys, kind="stable")

        # the short batch is cut at a random size, or the largest grids would always be the ones in it
        full, rest = divmod(len(order), self.batch_size)
        cut = int(rng.integers(full + 1)) * self.batch_size
        short, long = order[cut : cut + rest], np.concatenate([order[:cut], order[cut + rest :]])
        batches = list(long.reshape(full, self.batch_size)[rng.permutation(full)])
        self._batch_orders[sweep] = batches + [short] if rest else batches
        # a window may reach over the end of a pass
        while len(self._batch_orders) > 2:
            self._batch_orders.popitem(last=False)
        return self._batch_orders[sweep]
