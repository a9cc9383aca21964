"""Views and back, and which colours may take each other's place."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_fused.arc.episodes import Pair, Task
from qwen_fused.solver.views import UNCHANGED, View, free_colors, permuted


def task_of(*pairs) -> Task:
    train = tuple(Pair(np.array(a, np.uint8), np.array(b, np.uint8)) for a, b in pairs)
    return Task("t", train, train[:1])


@pytest.mark.parametrize("symmetry", range(8))
def test_undo_is_the_inverse(symmetry):
    rng = np.random.default_rng(symmetry)
    view = View(symmetry, permuted(np.arange(1, 10, dtype=np.uint8), rng))
    grid = rng.integers(0, 10, (3, 5)).astype(np.uint8)
    seen = view.apply(grid)
    assert seen.shape == view.size(*grid.shape)
    np.testing.assert_array_equal(view.undo(seen), grid)


def test_colours_of_every_pair_keep_their_role():
    # 5 is in every pair; 1, 2 and 3 stand in for one another
    task = task_of(([[5, 1]], [[1, 5]]), ([[5, 2]], [[2, 5]]), ([[5, 3]], [[3, 5]]))
    assert free_colors(task).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert 0 not in free_colors(task)


def test_no_colour_is_free_where_colours_are_mapped_to_colours():
    assert free_colors(task_of(([[1]], [[5]]), ([[2]], [[6]]))).size == 0


def test_no_colour_is_free_in_a_lone_pair():
    assert free_colors(task_of(([[1, 2]], [[2, 1]]))).size == 0


def test_permuted_moves_the_given_colours_alone():
    table = permuted(np.array([2, 4, 6], np.uint8), np.random.default_rng(3))
    assert sorted(table.tolist()) == UNCHANGED.tolist()
    assert all(table[c] == c for c in range(10) if c not in (2, 4, 6)) and table.tolist() != UNCHANGED.tolist()
