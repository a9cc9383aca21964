"""Two attempts from many views: whole grids are counted."""

from __future__ import annotations

import numpy as np

from qwen_fused.solver.vote import count


def sure_of(*grids, certainty: float = 0.9) -> np.ndarray:
    """[V, 10, h, w]: each view sure of its own grid."""
    shape = np.shape(grids[0])
    p = np.full((len(grids), 10, *shape), (1 - certainty) / 9)
    for number, grid in enumerate(grids):
        np.put_along_axis(p[number], np.array(grid)[None], certainty, 0)
    return p


def test_most_votes_first():
    a, b, c = [[1, 2]], [[3, 4]], [[5, 6]]
    vote = count(sure_of(a, b, a, c, b, a))
    assert vote.attempts[0].tolist() == a and vote.attempts[1].tolist() == b
    assert 0 < vote.confidence < 0.5


def test_a_tie_goes_to_the_likelier_grid():
    sure, doubtful = sure_of([[1]], certainty=0.9), sure_of([[2]], certainty=0.4)
    assert [grid.tolist() for grid in count(np.concatenate([doubtful, sure])).attempts] == [[[1]], [[2]]]


def test_one_voice_gets_a_second_attempt_that_differs():
    p = sure_of([[1, 2]])
    p[0, 7, 0, 1] = 0.5
    vote = count(np.concatenate([p, p]))
    assert vote.attempts[0].tolist() == [[1, 2]] and vote.attempts[1].tolist() == [[1, 7]]


def test_all_views_sure_and_agreed_is_full_confidence():
    assert count(sure_of(*[[[1, 2]]] * 8, certainty=1 - 1e-9)).confidence > 0.999
    assert all(grid.dtype == np.uint8 for grid in count(sure_of([[1]])).attempts)


def test_the_mean_answers_where_every_view_is_alone():
    # each view is wrong in a cell of its own; cell by cell the majority is right
    right = np.zeros((1, 3), int)
    views = []
    for cell in range(3):
        grid = right.copy()
        grid[0, cell] = 1
        views.append(grid)
    vote = count(sure_of(*views))
    assert right.tolist() in [grid.tolist() for grid in vote.attempts]
