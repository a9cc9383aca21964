"""Attempts at an answer after the first."""

from __future__ import annotations

import numpy as np


def further_attempts(probabilities: np.ndarray, other: np.ndarray, count: int) -> list[np.ndarray]:
    """Attempts after the first: another grid where there is one, then the first with a least certain cell changed."""
    ranked = probabilities.argsort(0)[::-1]
    first, runner_up = ranked[0].astype(np.uint8), ranked[1].astype(np.uint8)
    grids = [] if np.array_equal(other, first) else [other]
    ordered = np.sort(probabilities, 0)
    doubt = (ordered[-1] - ordered[-2]).ravel().argsort()
    for cell in doubt[: max(count - len(grids), 0)]:
        grid = first.copy()
        grid.flat[cell] = runner_up.flat[cell]
        grids.append(grid)
    return (grids + [first] * count)[:count]
