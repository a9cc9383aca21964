"""The eight symmetries of the square, on grids and on whole episodes."""

from __future__ import annotations

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
    return replace(
        episode,
        demonstrations=tuple(
            replace(p, input=turn(p.input, symmetry), output=turn(p.output, symmetry))
            for p in episode.demonstrations
        ),
        query=turn(episode.query, symmetry),
        answer=None if episode.answer is None else turn(episode.answer, symmetry),
    )
