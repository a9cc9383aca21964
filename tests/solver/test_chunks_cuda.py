"""Tasks side by side on a CUDA device: a graph does what its launches do, waits for nothing and leaves nothing behind.

Every body runs on the CPU too, see devices.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from devices import in_use, no_sync
from forked_workers import StandIn, make_task

from qwen_fused.solver import captured
from qwen_fused.solver.adapt import adapt
from qwen_fused.solver.adapt_many import TrainingStep, adapt_many
from qwen_fused.solver.chunks import cell_bytes, free, run_chunks
from qwen_fused.solver.folder import solve_folder
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solve import make_questions, solve_tasks
from qwen_fused.solver.stacked import StackedPlanner, stack_prompts
from qwen_fused.solver.task_planner import encode_task

SETTINGS = SolveSettings(steps=12, batch=4, average=0.9)
# of different sizes, numbers of pairs and of test inputs
TASKS = [make_task("a", side=3), make_task("b", side=5, pairs=3), make_task("c", side=4, tests=2)]


def planner_on(device: torch.device) -> StandIn:
    return StandIn().to(device)


def encoded(planner: StandIn) -> list:
    return [encode_task(planner, task, SETTINGS.symmetries) for task in TASKS]


def step_on(device: torch.device) -> TrainingStep:
    planner = planner_on(device)
    stacked = StackedPlanner(planner.agent, *stack_prompts(encoded(planner), device))
    return TrainingStep(stacked, TASKS, SETTINGS)


@pytest.mark.parametrize("capture", [True, False])
def test_losses_are_those_of_one_by_one_on_the_cpu(device, monkeypatch, capture):
    monkeypatch.setattr(captured, "CAPTURE", capture)
    planner = planner_on(device)
    found = adapt_many(planner.agent, encoded(planner), TASKS, SETTINGS)
    for task, losses in zip(TASKS, found.losses, strict=True):
        assert losses == pytest.approx(adapt(StandIn(), task, SETTINGS).losses, rel=2e-3, abs=1e-4)


def test_a_step_waits_for_nothing(device):
    step = step_on(device)
    step.run(0, 0.1)
    with no_sync(device):
        for number in range(1, 8):
            step.run(number, 1.0)
    assert (step.losses[:8] > 0).all() and step.losses.isfinite().all()
    assert step.optimizer.steps.item() == 8


def test_the_warm_up_leaves_no_trace(device):
    step = step_on(device)
    starts = zip(step.optimizer.parameters, step.optimizer.start, strict=True)
    assert all(torch.equal(parameter, start) for parameter, start in starts)
    assert not any(state.any() for state in (*step.optimizer.first, *step.optimizer.second, step.optimizer.steps))


def rows_of(planner: StandIn, **options) -> list:
    return list(run_chunks(planner.agent, make_questions(planner, TASKS, SETTINGS), SETTINGS, **options))


def test_it_leaves_nothing_behind(device):
    planner = planner_on(device)
    rows_of(planner)
    free(device)
    before = in_use(device)
    for _ in range(3):
        assert not any(row.failed for row in rows_of(planner))
    free(device)
    # the rows' own arrays are no tensors
    assert in_use(device) <= before + (0 if device.type == "cuda" else 10)


@pytest.mark.gpu
def test_with_too_little_memory_chunks_are_halved():
    device = torch.device("cuda")
    planner = planner_on(device)
    tasks = [make_task(f"task{number}", side=30, pairs=2) for number in range(16)]
    settings = replace(SETTINGS, steps=2, batch=8)
    questions = list(make_questions(planner, tasks, settings))
    sizes: list[int] = []
    total = torch.cuda.get_device_properties(device).total_memory
    # half of what the chunk of all sixteen is thought to take
    needed = cell_bytes(planner.agent, settings) * 16 * 30 * 30
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + needed / 2) / total)
    try:
        rows = list(
            run_chunks(
                planner.agent, iter(questions), settings, chunk_bytes=1e18, on_step=lambda t, _: sizes.append(len(t))
            )
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(rows) == 16 and not any(row.failed for row in rows) and max(sizes) < 16


def test_a_solve_on_the_device_goes_on_where_it_was(device, tmp_path):
    def solve(**options) -> dict:
        with solve_folder(tmp_path / "out", {}) as folder:
            solve_tasks(planner_on(device), TASKS, SETTINGS, folder=folder, side_by_side=True, **options)
        return json.loads((tmp_path / "out" / "submission.json").read_text())

    assert sorted(solve(should_stop=lambda: True)) == ["a", "b", "c"]
    whole = solve()
    rows = (tmp_path / "out" / "results.jsonl").read_text()
    assert len(rows.splitlines()) == 3 and solve() == whole
    assert (tmp_path / "out" / "results.jsonl").read_text() == rows
