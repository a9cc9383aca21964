"""The page of a solve: every task with its grids and verdict, whatever its name, and figures that are true."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from forked_workers import answer_of, make_task

from qwen_fused.report.solve_page import (
    CURVE,
    LOSSES,
    ShownTask,
    ShownTest,
    by_confidence,
    curve_points,
    write_solve_page,
)
from qwen_fused.solver.page import shown, write_page
from qwen_fused.solver.results import TaskResult, digest, fallback
from qwen_fused.solver.solution import Solution


def grid(value: int, rows: int = 3, columns: int = 4) -> np.ndarray:
    return np.full((rows, columns), value, np.uint8)


def test(*attempts: int, answer: int | None = 1) -> ShownTest:
    found = ShownTest(grid(0), tuple(map(grid, attempts)), None if answer is None else grid(answer), 0.5)
    return found


# the name starts as pytest's own do
test.__test__ = False  # type: ignore[attr-defined]


def task(*tests: ShownTest, **changes) -> ShownTask:
    plain = ShownTask("t", ((grid(2), grid(3)),), tests, 0.5, (1.0, 0.1), 2.0, 2, 1.0, "", False)
    return replace(plain, **changes)


def test_verdicts():
    assert [test(1, 2).right, test(2, 1).right, test(2, 3).right, test(1, 2, answer=None).right] == [1, 2, 0, None]
    assert test(2, 3).verdict == "0.0 % of cells right" and test(2, 1).verdict == "attempt 2 is right"
    # the errors of a right first attempt are none
    assert test(1, 2).errors is None and test(1, 2, answer=None).errors is None and test(2, 1).errors.shape == (3, 4)
    assert task(test(1, 2), test(2, 1)).state == "solved"
    assert task(test(1, 2), test(2, 3)).state == "unsolved"
    assert task(test(1, 2), test(2, 3, answer=None)).state == "unknown"
    assert task(test(1, 2), failed="it broke").state == "failed"


def test_bins_count_scored_tasks_once():
    tasks = [task(test(1, 2), confidence=c) for c in (0.0, 0.3, 0.9, 1.0)]
    tasks += [task(test(2, 3), confidence=0.95), task(test(1, 2, answer=None), confidence=0.95)]
    assert by_confidence(tasks) == [
        {"low": 0.9, "high": 1.0, "tasks": 3, "solved": 2},
        {"low": 0.3, "high": 0.5, "tasks": 1, "solved": 1},
        {"low": 0.0, "high": 0.3, "tasks": 1, "solved": 1},
    ]


def points(losses) -> np.ndarray:
    return np.array([point.split(",") for point in curve_points(losses).split()], float)


def test_curves_share_an_axis_and_stay_in_their_picture():
    low, high = LOSSES
    drawn = points([high, (low * high) ** 0.5, low, low / 100, high * 100, float("nan")])
    assert drawn[:, 0] == pytest.approx(CURVE[0] * (np.arange(6) + 0.5) / 6, abs=0.05)
    # down is less: the middle of a logarithmic axis is the geometric mean
    assert drawn[:, 1] == pytest.approx([2, CURVE[1] / 2, CURVE[1] - 2, CURVE[1] - 2, 2, 2], abs=0.05)
    assert len(points(np.linspace(1, 0.1, 5000).tolist())) == 110 and curve_points(()) == ""


@pytest.fixture
def solution(tmp_path) -> Solution:
    """Two of four solved, one failed, one nobody knows."""
    tasks = [make_task("task2", tests=2), make_task("task1", side=30), make_task("task4", answers=False)]
    odd = make_task('<script>alert("1")</script>2')
    broken = make_task("task6")
    results = {t.id: TaskResult(answer_of(t, seconds=2.0), digest(t)) for t in [*tasks, odd]}
    results["task6"] = fallback(broken, "its worker process was ended by SIGKILL")
    return Solution((*tasks, odd, broken), results)


def test_page(tmp_path, solution):
    write_page(tmp_path / "solve.html", solution, title="A & B", lead=["From random weights."])
    page = (tmp_path / "solve.html").read_text()
    assert "<h1>A &amp; B</h1>" in page and "From random weights." in page
    assert page.count('<section class="card task') == 5 and "<script>alert" not in page
    # the surest first
    ids = [unescape(found) for found in re.findall(r'data-id="(.*?)"', page)]
    assert ids == ['<script>alert("1")</script>2', "task2", "task4", "task1", "task6"]
    text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))
    for figure in (
        "2 of 4 test inputs right: 3 of 5",
        "4 of 5 the others have their query",
        "2.0 s training, one core",
    ):
        assert figure in text, figure
    assert "1 to 10 4 2 of 3 2.0 s" in text and "21 to 30 1 0 of 1 2.0 s" in text
    assert "0.9 to 1.0 2 2 100 %" in text
    assert "its worker process was ended by SIGKILL" in text and "✓ solved" in text and "✗ not solved" in text
    # demonstrations, query, attempts, and answers where they are known; errors where the first attempt is not right
    assert page.count("<img ") == 5 * 4 + 6 * 3 + 5 + 2
    assert page.count("<polyline") == 4 and "http" not in page.replace("http-equiv", "")


def test_without_answers_nothing_is_scored(tmp_path):
    task = make_task("task2", answers=False)
    write_page(tmp_path / "solve.html", Solution((task,), {"task2": TaskResult(answer_of(task), digest(task))}))
    page = (tmp_path / "solve.html").read_text()
    assert "not scored" in page and "no answer is known" in page and "By how sure it is" not in page
    assert "<h1>solve</h1>" in page


def test_nothing_but_nans(tmp_path):
    task = make_task("task2")
    found = replace(shown(task, fallback(task)), losses=(float("nan"),), own_solved=float("nan"))
    write_solve_page(tmp_path / "p.html", title="t", lead=(), tiles=(), sizes=(), tasks=[found])
    assert "own pairs right: –" in re.sub(r"\s+", " ", (tmp_path / "p.html").read_text())
