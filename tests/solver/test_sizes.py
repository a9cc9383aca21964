"""Size rules that demonstrations agree on."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_fused.arc.episodes import Pair, Task
from qwen_fused.solver.sizes import size_rule


def task_of(*shapes) -> Task:
    train = tuple(Pair(np.zeros(a, np.uint8), np.zeros(b, np.uint8)) for a, b in shapes)
    return Task("t", train, train[:1])


@pytest.mark.parametrize(
    ("shapes", "query", "answer"),
    [
        ([((3, 4), (3, 4)), ((5, 5), (5, 5))], (7, 2), (7, 2)),
        ([((3, 3), (9, 9)), ((3, 3), (9, 9))], (3, 3), (9, 9)),
        ([((4, 6), (2, 3)), ((8, 4), (4, 2))], (6, 6), (3, 3)),
        ([((3, 4), (4, 3)), ((2, 5), (5, 2))], (6, 1), (1, 6)),
        ([((9, 4), (9, 2)), ((5, 6), (5, 3))], (7, 8), (7, 4)),
        ([((9, 4), (3, 3)), ((5, 6), (3, 3))], (7, 8), (3, 3)),
        # one ratio by chance, which the query does not fit: the size itself
        ([((10, 10), (3, 3)), ((10, 10), (3, 3))], (12, 12), (3, 3)),
        # the ratio would leave the canvas
        ([((3, 3), (9, 9)), ((3, 3), (9, 9))], (20, 3), (9, 9)),
    ],
)
def test_the_rule_fits(shapes, query, answer):
    rule = size_rule(task_of(*shapes))
    assert rule is not None and rule(query) == answer


def test_no_rule_where_sizes_differ_without_one():
    assert size_rule(task_of(((3, 3), (1, 2)), ((3, 3), (2, 2)))) is None


def test_a_ratio_that_no_whole_number_fits_is_rounded():
    rule = size_rule(task_of(((4, 4), (2, 2)), ((6, 6), (3, 3))))
    assert rule is not None and rule((7, 4)) == (4, 2) and rule((1, 1)) == (1, 1)
