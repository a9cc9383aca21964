"""`qf.solve`: arguments, what it says, and ends that a user sees; the answering itself is tests/solver's."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_workers import SETTINGS, StandIn, make_task, stand_in, use_forked_workers

import qwen_fused as qf
from qwen_fused.arc.reader import load_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.train import solve_run as module
from qwen_fused.train.signals import Interrupted
from qwen_fused.train.solve_run import SolveStopped, fingerprint, new_solve_folder, open_planner, read_tasks


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Forked workers that solve at once, for a planner of no weight."""
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    use_forked_workers(monkeypatch, stand_in)
    monkeypatch.setattr(module, "open_planner", lambda *arguments: (StandIn(), "From nothing."))


NAMES = ["task1", "task2", "task3", "task4"]


def solve(out: Path | None, *names: str, **options):
    tasks = [make_task(name, tests=2) for name in names or NAMES]
    return qf.solve(tasks, out=out, settings=SETTINGS, workers=2, **options)


def test_everything_that_is_written(quick, tmp_path, capsys):
    solution = solve(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "solve.json", "results.jsonl", "submission.json", "score.json", "solve.log", "solve.html",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "score.json").read_text()) == json.loads(json.dumps(solution.to_dict()))
    said = capsys.readouterr().out
    assert said == (tmp_path / "out" / "solve.log").read_text()
    assert "From nothing." in said and "4 tasks, at most 3 steps of training each." in said
    assert "Sides  1 to 10: 4 tasks, 2 of 4 solved, 0.0 s a task" in said
    assert "Solved 2 of 4 tasks; of 8 test inputs pass@1 0.5000, pass@2 0.5000" in said
    assert solution.evaluation.solved_tasks == ("task2", "task4")


def test_without_a_folder_nothing_is_written(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert solve(None, quiet=True).evaluation.pass_at_2 == 0.5
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_same_call_goes_on_and_another_is_refused(quick, tmp_path, capsys):
    solve(tmp_path / "out", limit=2)
    assert "2 tasks, at most" in capsys.readouterr().out
    solve(tmp_path / "out")
    assert "Going on: 2 of 4 tasks, 1 of 2 solved already." in capsys.readouterr().out
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="steps was 3, is 150"):
        qf.solve([make_task("task1")], out=tmp_path / "out")


def test_an_interrupt_ends_with_what_is_there_and_the_same_call_goes_on(quick, tmp_path, capsys):
    def interrupt():
        while not (tmp_path / "waits-1").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as ended:
        solve(tmp_path / "out", *NAMES, "waits-1", max_minutes=10)
    thread.join()
    assert ended.value.exit_code == 130
    said = capsys.readouterr().out
    assert "1 tasks have their query for an answer: waits-1." in said and "Interrupted: the same command" in said
    assert set(json.loads((tmp_path / "out" / "submission.json").read_text())) == {*NAMES, "waits-1"}
    assert json.loads((tmp_path / "out" / "score.json").read_text())["unanswered"] == ["waits-1"]
    assert (tmp_path / "out" / "solve.html").exists()
    # what is left is a task that waits for ever: its time is over at once
    solve(tmp_path / "out", *NAMES)
    assert "Going on: 4 of 4 tasks" in capsys.readouterr().out


def test_a_full_disk_is_told_in_a_sentence(quick, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr("qwen_fused.solver.folder.SolveFolder.add", full)
        with pytest.raises(SolveStopped, match="results.jsonl: No space left on device; what is done is in .*out/"):
            solve(tmp_path / "out")
    assert not solve(tmp_path / "out").unanswered


def test_workers_that_cannot_start_are_told(quick, monkeypatch):
    def start(self, job, theirs, command):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("qwen_fused.solver.workers.Worker.start", start)
    with pytest.raises(SolveStopped, match="Resource temporarily unavailable"):
        solve(None)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"limit": 0}, "limit must be a number above 0, got 0"),
        ({"workers": 0}, "workers must be a number above 0, got 0"),
        ({"max_minutes": -1.0}, "max_minutes must be a number above 0, got -1.0"),
        ({"split": "evaluation"}, "split must be None where tasks are given as such, got 'evaluation'"),
        ({"tasks": []}, "tasks must be at least one task, got "),
        ({"tasks": [make_task("a"), make_task("a")]}, r"tasks must be tasks with different ids, got \['a'\]"),
        ({"tasks": "arc3"}, 'dataset must be arc1, arc2, a folder or a file, got "arc3", which does not exist'),
        ({"run": "no-run"}, "run must be a run folder with a config.yaml, got no-run"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(options, told, tmp_path):
    options = {"tasks": [make_task("task1")], "out": tmp_path / "out", **options}
    with pytest.raises(ValueError, match=told):
        qf.solve(options.pop("tasks"), **options)
    assert not (tmp_path / "out").exists()


def test_tasks_of_one_pair_and_tasks_that_cannot_be_read(tmp_path, quick, capsys):
    grid = [[1, 2], [3, 4]]
    pair = {"input": grid, "output": grid}
    tasks = {
        "one": {"train": [pair], "test": [{"input": grid}]},
        "none": {"train": [{"input": grid, "output": [[11]]}], "test": [{"input": grid}, {"input": grid}]},
        "ragged": {"train": [pair, pair], "test": [{"input": [[1], [2, 3]]}]},
        "empty": {"train": [pair], "test": []},
    }
    (tmp_path / "x_challenges.json").write_text(json.dumps(tasks))
    qf.solve(tmp_path / "x_challenges.json", settings=SETTINGS, out=tmp_path / "out")
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    # every task that asks something is in it
    assert {name: len(answers) for name, answers in submission.items()} == {"one": 1, "none": 2, "ragged": 1}
    said = capsys.readouterr().out
    assert said.count("Left out: ") == 4 and "train has 0 usable of 1 pairs; one is needed" in said
    assert "Not scored: no answer is known." in said


def test_limit_counts_tasks_that_cannot_be_read(tmp_path):
    grid = [[1]]
    tasks = {name: {"train": [{"input": grid, "output": grid}] * 2, "test": [{"input": grid}]} for name in "bdf"}
    tasks |= {name: {"train": [], "test": [{"input": grid}]} for name in "ace"}
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    collection = read_tasks(tmp_path / "t.json", None, 3)
    assert [task.id for task in collection.tasks] == ["b"] and [task.id for task in collection.unusable] == ["a", "c"]


def test_random_weights_are_told_and_are_the_seeds(capsys):
    first, told = open_planner(None, "last", SolveSettings(seed=3), "cpu")
    again, _ = open_planner(None, "last", SolveSettings(seed=3), "cpu")
    other, _ = open_planner(None, "last", SolveSettings(seed=4), "cpu")
    assert told.startswith("Without a run: from random weights (seed 3)")
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert first.config == TrainConfig(seed=3)


def test_fingerprint_sees_one_weight():
    planner, _ = open_planner(None, "last", SolveSettings(), "cpu")
    before = fingerprint(planner)
    parameter = next(planner.prompt.parameters())
    parameter.data.view(-1)[-1] += 1e-3
    assert fingerprint(planner) != before


def test_folders_of_one_second_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "strftime", lambda form: "20260101-000000")
    first = new_solve_folder(tmp_path)
    first.mkdir()
    assert (first.name, new_solve_folder(tmp_path).name) == ("20260101-000000", "20260101-000000-1")


def test_a_run_solves_for_real(small_config, small_arc, tmp_path, capsys):
    """From a run's weights, with processes of their own: the same answers as without processes, and for one and two."""
    from qwen_fused.solver.settings import SolveSettings
    from qwen_fused.solver.task_solver import solve_task
    from qwen_fused.train.loop import train
    from qwen_fused.train.saved import load_model

    torch.set_num_threads(1)
    run = train(small_config(max_batches=2))
    settings = SolveSettings(steps=4, seed=5)
    solutions = [
        qf.solve(small_arc, run=run, settings=settings, workers=workers, limit=3, device="cpu") for workers in (1, 2)
    ]
    assert f"From the last weights of run {run}." in capsys.readouterr().out
    planner = load_model(run)
    for task in load_tasks(str(small_arc)).tasks[:3]:
        expected = solve_task(planner, task, settings)
        for solution in solutions:
            result = solution.results[task.id]
            assert not result.failed and result.answer.losses == pytest.approx(expected.losses, rel=1e-5)
            for grids, others in zip(result.answer.attempts, expected.attempts, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(grids, others, strict=True))
    one, two = ([r.to_plain() | {"seconds": 0} for r in sorted(s.results.values(), key=id_of)] for s in solutions)
    assert one == two


def id_of(result) -> str:
    return result.answer.task_id
