"""The eight symmetries of the square, on grids and on whole episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen_fused.data import Episode

SYMMETRIES = 8


def turn(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """Turn the last two axes by symmetry % 4 quarters, then mirror the columns if symmetry >= 4; contiguous."""
    turned = np.rot90(grid, symmetry % 4, axes=(-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if symmetry >= 4 else turned)


def turn_back(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """Inverse of `turn`."""
    mirrored = grid[..., ::-1] if symmetry >= 4 else grid
    return np.ascontiguousarray(np.rot90(mirrored, -(symmetry % 4), axes=(-2, -1)))


def swaps_sides(symmetry: int) -> bool:
    """Whether height and width change places."""
    return symmetry % 2 == 1


def turn_episode(episode: Episode, symmetry: int) -> Episode:
    """Every grid of an episode turned in the same way."""
    return map_grids(episode, lambda grid: turn(grid, symmetry))


def map_grids(episode: Episode, change: Callable[[np.ndarray], np.ndarray]) -> Episode:
    """An episode with every grid of it changed in the same way; the new grids are read-only, as loaded ones are."""

    def apply(grid: np.ndarray) -> np.ndarray:
        changed = change(grid)
        changed.flags.writeable = False
        return changed

    def apply_known(grid: np.ndarray | None) -> np.ndarray | None:
        return None if grid is None else apply(grid)

    return replace(
        episode,
        demonstrations=tuple(
            replace(pair, input=apply(pair.input), output=apply_known(pair.output)) for pair in episode.demonstrations
        ),
        query=apply(episode.query),
        answer=apply_known(episode.answer),
    )
