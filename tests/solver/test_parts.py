"""The part of a grid that its answer is in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_fused.arc.episodes import Pair, Task, load_tasks
from qwen_fused.arc.split import split_tasks
from qwen_fused.solver.parts import box_of, connected, narrowed, panes, parts


def grid(text: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in text.split()], np.uint8)


def with_object(side: int, row: int, column: int, rows: int, columns: int, color: int = 3) -> np.ndarray:
    made = np.zeros((side, side), np.uint8)
    made[row : row + rows, column : column + columns] = color
    return made


def cut(made: np.ndarray, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    return made[row : row + rows, column : column + columns]


PLACES = [(8, 1, 2, 3, 4), (9, 4, 0, 2, 5), (7, 2, 2, 4, 1)]


def task_of(places=PLACES, answers=lambda made, place: cut(made, *place[1:]), **options) -> Task:
    made = [with_object(*place, **options) for place in places]
    pairs = [Pair(one, answers(one, place)) for one, place in zip(made, places, strict=True)]
    return Task("t", tuple(pairs[:-1]), (Pair(made[-1], None),))


def test_a_box_of_another_size_in_every_pair_is_found():
    found = narrowed(task_of())
    assert [pair.input.shape for pair in found.train] == [(3, 4), (2, 5)]
    assert all(np.array_equal(pair.input, pair.output) for pair in found.train)
    assert np.array_equal(found.test[0].input, np.full((4, 1), 3)) and found.test[0].output is None


def test_what_becomes_of_the_part_is_left_to_the_planner():
    found = narrowed(task_of(answers=lambda made, place: 2 * cut(made, *place[1:])))
    assert [pair.input.max() for pair in found.train] == [3, 3] and [pair.output.max() for pair in found.train] == [
        6,
        6,
    ]


def test_a_task_of_one_size_in_and_out_stays_as_it_is():
    task = task_of(answers=lambda made, place: made)
    assert narrowed(task) is task


def test_where_sizes_follow_a_rule_the_part_has_to_be_the_answer():
    places = [(8, 1, 2, 2, 2), (8, 4, 0, 2, 2), (8, 3, 3, 2, 2)]
    assert narrowed(task_of(places)).test[0].input.shape == (2, 2)
    task = task_of(places, answers=lambda made, place: 2 * cut(made, *place[1:]))
    assert narrowed(task) is task


def test_a_part_that_the_query_does_not_have_is_not_taken():
    task = task_of()
    nothing = replace(task, test=(Pair(np.zeros((5, 5), np.uint8), None),))
    assert narrowed(nothing) is nothing


def test_an_answer_in_the_file_changes_nothing():
    task = task_of()
    known = replace(task, test=(Pair(task.test[0].input, np.zeros((9, 9), np.uint8)),))
    assert np.array_equal(narrowed(known).test[0].input, narrowed(task).test[0].input)


@pytest.mark.parametrize(
    ("made", "name", "box"),
    [
        ("0000 0110 0100 0000", "colour 1", (1, 3, 1, 3)),
        ("2222 2112 2132 2222", "all but the commonest", (1, 3, 1, 3)),
        ("2222 2112 2132 2222", "rarest colour", (2, 3, 2, 3)),
        ("00000 04440 04140 04440 00000", "inside of second commonest colour", (2, 3, 2, 3)),
        ("1100 1100 0002 0000", "object on 0, most cells", (0, 2, 0, 2)),
        ("1100 1100 0002 0000", "object on 0, least cells", (2, 3, 3, 4)),
        ("1010 0000 1020 0000", "object on 0, odd colors", (2, 3, 2, 3)),
        ("1010 0000 2000 0000", "object on 0, commonest colors", (0, 1, 0, 1)),
        ("100000 010011 000010 110000 100000", "object on 0, odd shape", (0, 2, 0, 2)),
    ],
)
def test_parts_have_names(made, name, box):
    assert parts(grid(made))[name] == box


def test_of_two_that_are_each_alone_of_their_kind_none_is_the_odd_one():
    found = parts(grid("1010 0000 2030 0000"))
    assert "object on 0, odd colors" not in found and found["object on 0, commonest colors"] == (0, 1, 0, 1)


def test_panes_lie_between_lines_that_cross_the_grid():
    found = panes(grid("00500 07500 55555 00500 00500"))
    assert [found[f"pane {place}"] for place in range(4)] == [(0, 2, 0, 2), (0, 2, 3, 5), (3, 5, 0, 2), (3, 5, 3, 5)]
    assert found["last pane"] == found["pane 3"] and found["pane, odd content"] == found["pane 0"]
    # of a line at the border nothing lies beyond, and the background is none
    assert panes(grid("000 010 000 222")) == {}
    assert panes(grid("12 34")) == {}


def test_connected_parts_touch_at_corners_and_are_in_order():
    found = connected(grid("1001 0100 0011") > 0)
    assert [mask.sum() for mask in found] == [4, 1]
    assert box_of(found[0]) == (0, 3, 0, 4)


@pytest.mark.parametrize("side", [1, 30])
def test_any_grid_has_its_parts(side):
    rng = np.random.default_rng(0)
    for colors in (1, 2, 10):
        made = rng.integers(0, colors, (side, side)).astype(np.uint8)
        for a, b, c, d in parts(made).values():
            assert 0 <= a < b <= side and 0 <= c < d <= side


def test_of_real_tasks_most_are_of_the_right_size():
    training, _ = split_tasks(load_tasks("arc1").tasks, 0.1, 0)
    changed = [(task, narrowed(task)) for task in training]
    changed = [(task, shown) for task, shown in changed if shown is not task]
    right = [all(pair.input.shape == pair.output.shape for pair in shown.test) for _, shown in changed]
    assert len(changed) == 28 and sum(right) == 26
    assert all(pair.input.shape == pair.output.shape for _, shown in changed for pair in shown.train)
