"""Tasks side by side: the rows of workers, whatever is put together, and what fails costs itself alone."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_workers import StandIn, make_task

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.arc.split import split_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import chunks
from qwen_fused.solver.chunks import cost_canvas, make_chunks, run_chunks
from qwen_fused.solver.folder import solve_folder
from qwen_fused.solver.parts import narrowed
from qwen_fused.solver.question import make_question
from qwen_fused.solver.results import digest
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solve import make_questions, solve_tasks
from qwen_fused.solver.task_solver import solve_task

SETTINGS = SolveSettings(steps=3, batch=2)


def rows_of(tasks, settings=SETTINGS, planner=None, **options) -> dict:
    planner = planner or StandIn()
    rows = run_chunks(planner.agent, make_questions(planner, tasks, settings), settings, **options)
    return {row.answer.task_id: row for row in rows}


def test_real_tasks_get_the_attempts_that_one_by_one_gives():
    held_out = split_tasks(load_tasks("arc1").tasks, 0.1, 0)[1]
    # of the last a part is shown alone
    tasks = [t for t in held_out if max(cost_canvas(t)) <= 8][:4] + [t for t in held_out if t.id == "39a8645d"]
    settings = SolveSettings(steps=12, batch=4, seed=1)
    torch.manual_seed(0)
    planner = QwenPlanner(TrainConfig(agent_channels=16, prompt_dim=16, plan_steps=3))
    together = rows_of(tasks, settings, planner)
    for task in tasks:
        alone, found = solve_task(planner, task, settings), together[task.id].answer
        assert found.steps == alone.steps == 12
        assert found.losses == pytest.approx(alone.losses, rel=1e-3, abs=1e-4)
        for a, b in zip(found.attempts, alone.attempts, strict=True):
            assert [grid.tolist() for grid in a] == [grid.tolist() for grid in b]
        assert found.confidence == pytest.approx(alone.confidence, abs=1e-3)
        assert found.own_accuracy == pytest.approx(alone.own_accuracy, abs=0.02)


def test_a_part_is_planned_where_the_answer_is_one_and_the_row_is_of_the_whole_question():
    task = next(t for t in load_tasks("arc1").tasks if t.id == "0b148d64")
    part = narrowed(task)
    torch.manual_seed(0)
    planner = QwenPlanner(TrainConfig(agent_channels=16, prompt_dim=16, plan_steps=2))
    row = rows_of([task], SETTINGS, planner)[task.id]
    assert row.question == digest(task) != digest(part)
    alone = solve_task(planner, task, SETTINGS)
    for answer in (row.answer, alone):
        assert answer.attempts[0][0].shape == part.test[0].input.shape != task.test[0].input.shape
        assert answer.losses == pytest.approx(alone.losses, rel=1e-3)


def test_one_that_is_broken_costs_itself_alone(monkeypatch):
    solve_chunk = chunks.solve_chunk
    sizes = []

    def choosy(agent, chunk, *rest):
        sizes.append(len(chunk))
        if any(question.task.id == "broken" for question in chunk):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve_chunk(agent, chunk, *rest)

    monkeypatch.setattr(chunks, "solve_chunk", choosy)
    rows = rows_of([make_task(name) for name in ("a", "b", "broken", "c", "d")])
    assert sorted(rows) == ["a", "b", "broken", "c", "d"] and sizes[0] == 5
    assert {name for name, row in rows.items() if row.failed} == {"broken"}
    assert rows["broken"].failed == "OutOfMemoryError: CUDA out of memory"
    assert all(row.answer.steps == 3 for name, row in rows.items() if name != "broken")


def test_chunks_hold_every_task_once_within_the_memory():
    class Item:
        def __init__(self, number, side):
            self.task, self.side = make_task(str(number)), side

    rng = np.random.default_rng(0)
    items = [Item(number, int(rng.integers(1, 31))) for number in range(60)]

    def made(budget: float, cells: float = 1.0) -> list:
        return make_chunks(items, lambda item: (item.side, item.side), cells, budget)

    def area(chunk) -> int:
        return len(chunk) * max(item.side for item in chunk) ** 2

    whole = made(math.inf)
    assert sorted(item.task.id for chunk in whole for item in chunk) == sorted(item.task.id for item in items)
    assert 1 < len(whole) < 20 and [area(c) / len(c) for c in whole] == sorted(area(c) / len(c) for c in whole)
    # the empty cells are fewer than those of one chunk, and no two neighbours are better off together
    assert sum(map(area, whole)) < area(items)
    for first, second in zip(whole, whole[1:], strict=False):
        assert area(first) + area(second) <= area(first + second) - chunks.CHUNK_CELLS
    budget = 3 * (30 * 30 * 1e5 + chunks.TASK_BYTES)
    for chunk in made(budget, 1e5):
        side = max(item.side for item in chunk)
        assert len(chunk) == 1 or len(chunk) * (side * side * 1e5 + chunks.TASK_BYTES) <= budget
    assert [len(chunk) for chunk in made(0.0)] == [1] * 60


def test_the_canvas_is_that_of_every_view():
    task = make_task("a", side=4)
    pair = replace(task.train[0], output=np.zeros((2, 7), np.uint8))
    assert cost_canvas(task) == (4, 4) and cost_canvas(replace(task, train=(pair,))) == (7, 7)


def test_a_time_limit_cuts_the_chunk_and_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CELLS", 0)
    tasks = [make_task("a", side=3), make_task("b", side=3), make_task("c", side=12)]
    settings = replace(SETTINGS, steps=10**6)
    rows = rows_of(tasks, settings, deadline=time.monotonic() + 3.0)
    assert set(rows) == {"a", "b"} and all(row.cut and 0 < row.answer.steps < 10**6 for row in rows.values())
    assert not rows_of(tasks, settings, deadline=time.monotonic())


def test_it_stops_in_the_middle_of_a_chunk():
    steps = []
    rows = rows_of(
        [make_task("a"), make_task("b")],
        replace(SETTINGS, steps=100),
        on_step=lambda tasks, step: steps.append((len(tasks), step)),
        should_stop=lambda: len(steps) >= 5,
    )
    assert not rows and steps == [(2, step) for step in range(1, 6)]


def test_a_solve_side_by_side_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CELLS", 0)
    tasks = [make_task(f"task{side}", side=side, tests=2) for side in range(3, 7)]

    def solve(name: str, **options) -> tuple[dict, list[str]]:
        with solve_folder(tmp_path / name, {}) as folder:
            solve_tasks(StandIn(), tasks, SETTINGS, folder=folder, side_by_side=True, **options)
        rows = [json.loads(row)["task"] for row in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        return json.loads((tmp_path / name / "submission.json").read_text()), rows

    unbroken, order = solve("unbroken")
    assert order == [task.id for task in tasks]
    done = []
    cut, rows = solve("out", should_stop=lambda: len(done) >= 2, on_result=done.append)
    assert sorted(cut) == sorted(unbroken) and rows == order[:2]
    again, rows = solve("out")
    assert again == unbroken and rows == order


def test_no_answer_is_seen(monkeypatch):
    seen = []
    solve_chunk = chunks.solve_chunk
    monkeypatch.setattr(chunks, "solve_chunk", lambda a, chunk, *r: (seen.extend(chunk), solve_chunk(a, chunk, *r))[1])
    rows_of([make_task("a"), make_task("b")])
    assert len(seen) == 2 and all(pair.output is None for question in seen for pair in question.task.test)


def test_without_steps_the_agent_answers_as_it_is():
    planner, task = StandIn(), make_task("a")
    settings = replace(SETTINGS, steps=0)
    row = rows_of([task], settings, planner)["a"]
    alone = solve_task(planner, task, settings)
    assert row.answer.steps == 0 and row.answer.losses == ()
    assert [g.tolist() for g in row.answer.attempts[0]] == [g.tolist() for g in alone.attempts[0]]
    assert make_question(planner, task, settings).task.id == "a"
