"""The eight symmetries are a group of the right size, and turning back undoes turning."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_fused.arc.episodes import Episode, Pair
from qwen_fused.arc.symmetry import SYMMETRIES, swaps_sides, turn, turn_back

GRID = np.arange(6, dtype=np.uint8).reshape(2, 3)


def test_all_eight_differ():
    seen = {(turn(GRID, s).shape, turn(GRID, s).tobytes()) for s in range(SYMMETRIES)}
    assert len(seen) == SYMMETRIES == 8
    np.testing.assert_array_equal(turn(GRID, 0), GRID)


@pytest.mark.parametrize("symmetry", range(SYMMETRIES))
def test_turn_back_is_inverse_also_for_stacks(symmetry):
    stack = np.random.default_rng(0).random((4, 2, 3))
    np.testing.assert_array_equal(turn_back(turn(stack, symmetry), symmetry), stack)
    turned = turn(GRID, symmetry)
    assert (turned.shape == GRID.shape[::-1]) == swaps_sides(symmetry)
    assert turned.flags.c_contiguous


def test_turn_episode_turns_every_grid_alike():
    episode = Episode("t", (Pair(GRID, GRID + 1),), GRID + 2, GRID + 3, 0)
    turned = episode.turn(5)
    for offset, grid in enumerate(
        (turned.demonstrations[0].input, turned.demonstrations[0].output, turned.query, turned.answer)
    ):
        np.testing.assert_array_equal(grid, turn(GRID, 5) + offset)
    assert episode.without_answer().turn(3).answer is None
