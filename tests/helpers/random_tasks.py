"""Tasks of random grids, for tests that need many."""

from __future__ import annotations

import numpy as np

from qwen_fused.arc.episodes import Pair, Task


def make_tasks(count: int, seed: int = 0) -> list[Task]:
    rng = np.random.default_rng(seed)

    def grid() -> np.ndarray:
        return rng.integers(0, 10, rng.integers(1, 31, size=2)).astype(np.uint8)

    def pairs(number: int) -> tuple[Pair, ...]:
        return tuple(Pair(grid(), grid()) for _ in range(number))

    return [Task(f"task{i:03d}", pairs(int(rng.integers(2, 6))), pairs(1)) for i in range(count)]
