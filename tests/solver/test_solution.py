"""Scores of a solution: by hand, by size, and "not scored" where nobody knows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
from forked_workers import answer_of, make_task

from qwen_fused.arc.tasks import Pair
from qwen_fused.solver.results import TaskResult, digest, fallback
from qwen_fused.solver.solution import Solution, canvas


def solution(*tasks, failed=()) -> Solution:
    results = {task.id: TaskResult(answer_of(task, seconds=2.0), digest(task)) for task in tasks}
    return Solution(tuple(tasks), results | {task.id: fallback(task, "it broke") for task in failed})


def test_scores_by_hand():
    # even ids are right, and a task counts when all of its inputs are
    right, wrong = make_task("task2", tests=2), make_task("task1")
    half = replace(
        make_task("task4", tests=2), test=(make_task("task4").test[0], Pair(np.ones((2, 2), np.uint8), None))
    )
    half = replace(half, test=(half.test[0], Pair(half.test[1].input, np.zeros((2, 2), np.uint8))))
    found = solution(right, wrong, half)
    assert found.evaluation.solved_tasks == ("task2",)
    assert found.evaluation.pass_at_2 == 3 / 5
    plain = found.to_dict()
    assert plain["by_task"] == {"task2": 1.0, "task1": 0.0, "task4": 0.5}
    assert (plain["tasks"], plain["tasks_solved"], plain["scored"], plain["seconds_a_task"]) == (3, 1, 5, 2.0)


def test_sizes_are_of_the_question():
    small, large = make_task("task2"), make_task("task4", side=30)
    # an answer is larger than all that is asked
    odd = replace(make_task("task6"), test=(Pair(np.zeros((3, 3), np.uint8), np.zeros((25, 25), np.uint8)),))
    assert canvas(odd) == (3, 3)
    assert [(row["sides"], row["tasks"], row["solved"]) for row in solution(small, large, odd).by_size()] == [
        ([1, 10], 2, 1),
        ([21, 30], 1, 1),
    ]


def test_edges_of_the_sizes():
    sides = [1, 10, 11, 20, 21, 30]
    rows = solution(*(make_task(f"task{side}", side=side) for side in sides)).by_size()
    assert [(row["sides"], row["tasks"]) for row in rows] == [([1, 10], 2), ([11, 20], 2), ([21, 30], 2)]


def test_without_answers_nothing_is_scored():
    found = solution(make_task("task2", answers=False), make_task("task1", answers=False))
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["scored"] == 0 and plain["pass_at_2"] is None and plain["by_task"] == {"task2": None, "task1": None}
    assert plain["sizes"] == [{"sides": [1, 10], "tasks": 2, "scored": 0, "solved": 0, "seconds": 2.0}]


def test_a_task_with_one_unknown_answer_is_not_scored():
    task = make_task("task2", tests=2)
    task = replace(task, test=(task.test[0], replace(task.test[1], output=None)))
    plain = solution(task).to_dict()
    assert plain["by_task"] == {"task2": None} and plain["scored"] == 1 and plain["sizes"][0]["scored"] == 0


def test_a_task_without_a_row_or_with_a_broken_one_has_its_query(tmp_path):
    done, never, broken = make_task("task2"), make_task("task3", tests=2), make_task("task4")
    found = replace(solution(done, failed=[broken]), tasks=(done, never, broken))
    assert found.unanswered == ("task3", "task4") and found.seconds == 2.0
    found.write_submission(tmp_path / "submission.json")
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert sorted(submission) == ["task2", "task3", "task4"]
    assert submission["task3"] == [{f"attempt_{k}": pair.input.tolist() for k in (1, 2)} for pair in never.test]
    assert submission["task2"][0]["attempt_1"] == done.test[0].output.tolist()


def test_nothing_answered():
    task = make_task("task2")
    found = Solution((task,), {})
    assert math.isnan(found.seconds) and found.to_dict()["seconds_a_task"] is None
    assert found.by_size()[0]["seconds"] is None
