"""The eight symmetries of the square."""

from __future__ import annotations

import numpy as np

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
