"""A task's row comes back as it was, and what was asked is known by a hash in which no answer is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from forked_workers import answer_of, make_task

from qwen_fused.arc.tasks import Pair
from qwen_fused.solver.results import TaskResult, digest, fallback


def test_row_comes_back_as_it_was():
    task = make_task("task2", tests=2)
    result = TaskResult(answer_of(task), digest(task), cut=True)
    again = TaskResult.from_plain(json.loads(json.dumps(result.to_plain(), allow_nan=False)))
    assert again.to_plain() == result.to_plain()
    assert again.answer.attempts[1][0].dtype == np.uint8 and again.cut and not again.final
    np.testing.assert_array_equal(again.answer.attempts[1][1], result.answer.attempts[1][1])
    assert again.answer.losses == pytest.approx(result.answer.losses, abs=1e-5)


def test_fallback_is_the_query_and_is_asked_again():
    task = make_task("task1", tests=2)
    result = TaskResult.from_plain(json.loads(json.dumps(fallback(task, "why").to_plain(), allow_nan=False)))
    assert not result.final and result.failed == "why" and result.confidence == 0
    assert math.isnan(result.answer.own_accuracy) and result.answer.losses == ()
    for pair, attempts in zip(task.test, result.answer.attempts, strict=True):
        assert len(attempts) == 2 and all(np.array_equal(grid, pair.input) for grid in attempts)


def test_confidence_is_that_of_the_least_sure_input():
    task = make_task("task2", tests=2)
    answer = replace(answer_of(task), confidence=(0.9, 0.25))
    assert TaskResult(answer, digest(task)).confidence == 0.25


@pytest.mark.parametrize(
    "change", [{"attempts": []}, {"attempts": [[[[1]]]]}, {"attempts": [[[[1]], [[11]]]]}, {"losses": None}]
)
def test_what_is_no_row_is_refused(change):
    task = make_task("task2")
    plain = TaskResult(answer_of(task), digest(task)).to_plain()
    TaskResult.from_plain(plain)
    with pytest.raises((ValueError, TypeError, KeyError)):
        TaskResult.from_plain({**plain, **change})


def test_digest_is_of_the_question_alone():
    task = make_task("task2", tests=2)
    other = replace(task, test=tuple(Pair(pair.input, np.zeros((1, 1), np.uint8)) for pair in task.test))
    unknown = replace(task, test=tuple(Pair(pair.input, None) for pair in task.test))
    assert digest(task) == digest(other) == digest(unknown)


@pytest.mark.parametrize("part", ["demonstration input", "demonstration output", "test input", "id", "pairs"])
def test_digest_sees_every_part_of_the_question(part):
    task = make_task("task2", tests=2)

    def turned(grid: np.ndarray) -> np.ndarray:
        return grid.T.copy()

    first, query = task.train[0], task.test[1]
    changed = {
        "demonstration input": {"train": (Pair(turned(first.input), first.output), *task.train[1:])},
        "demonstration output": {"train": (Pair(first.input, turned(first.output)), *task.train[1:])},
        "test input": {"test": (task.test[0], Pair(turned(query.input), query.output))},
        "id": {"id": "task3"},
        # the same grids, one demonstration fewer
        "pairs": {"train": task.train[:1], "test": (*task.test, task.train[1])},
    }[part]
    assert digest(replace(task, **changed)) != digest(task)
