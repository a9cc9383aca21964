"""Solving tasks: answers are read after they were handed in, and whatever ends it, the submission is whole."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked_workers import SETTINGS, StandIn, make_task, stand_in, use_forked_workers
from small_runs import fork

from qwen_fused.arc.tasks import Task
from qwen_fused.report.solve_log import SolveLog
from qwen_fused.solver import folder as folder_module
from qwen_fused.solver.folder import solve_folder
from qwen_fused.solver.solve import make_questions, solve_tasks

NAMES = [f"task{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def forked(monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    use_forked_workers(monkeypatch, stand_in)


def solved_in(out: Path, tasks, **options) -> dict:
    """The submission of a solve in this folder."""
    with solve_folder(out, {"steps": 3}) as folder:
        solve_tasks(StandIn(), tasks, SETTINGS, folder=folder, **{"workers": 2, **options})
    return json.loads((out / "submission.json").read_text())


def tasks_of(names, **options) -> list[Task]:
    return [make_task(name, tests=2, **options) for name in names]


def test_every_task_is_in_the_submission_for_any_number_of_workers(tmp_path):
    names = [*NAMES, "raises-1", "killed-1"]
    one = solved_in(tmp_path / "one", tasks_of(names), workers=1)
    two = solved_in(tmp_path / "two", tasks_of(names), workers=2)
    assert one == two and sorted(one) == sorted(names)
    assert all(len(attempts) == 2 and set(attempts[0]) == {"attempt_1", "attempt_2"} for attempts in one.values())


def test_an_answer_that_has_changed_changes_no_attempt(tmp_path):
    tasks = tasks_of(NAMES)
    other = [
        replace(task, test=tuple(replace(pair, output=np.full((2, 2), 7, np.uint8)) for pair in task.test))
        for task in tasks
    ]
    unknown = tasks_of(NAMES, answers=False)
    first = solved_in(tmp_path / "a", tasks)
    assert first == solved_in(tmp_path / "b", other) == solved_in(tmp_path / "c", unknown)


class Sealed:
    """A test pair that tells when its output is read."""

    def __init__(self, pair, read):
        self.input, self.sealed, self.read = pair.input, pair.output, read

    @property
    def output(self):
        self.read()
        return self.sealed


def test_answers_are_read_after_they_were_handed_in(tmp_path):
    read = []

    def seal(task: Task) -> Task:
        def reading():
            rows = [json.loads(line)["task"] for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
            assert task.id in rows, f"the answer of {task.id} was read before its row was written"
            read.append(task.id)

        return replace(task, test=tuple(Sealed(pair, reading) for pair in task.test))

    solved_in(tmp_path / "a", [seal(task) for task in tasks_of(NAMES)])
    assert set(read) == set(NAMES), "and then it was scored"


def test_no_question_holds_an_answer():
    def reading():
        raise AssertionError("an answer was read")

    tasks = [replace(t, test=tuple(Sealed(pair, reading) for pair in t.test)) for t in tasks_of(NAMES)]
    for question in make_questions(StandIn(), tasks, SETTINGS):
        assert all(pair.output is None for pair in question.task.test)


def test_what_qwen_cannot_read_costs_itself_alone(tmp_path):
    class Choosy(StandIn):
        def __init__(self):
            super().__init__()
            plain = self.prompt

            def prompt(demonstrations):
                if len(demonstrations[0]) == 3:
                    raise RuntimeError("too long a prompt")
                return plain(demonstrations)

            self.__dict__["prompt"] = prompt

    tasks = [*tasks_of(NAMES), make_task("odd", pairs=3)]
    solution = solve_tasks(Choosy(), tasks, SETTINGS, workers=2)
    assert solution.unanswered == ("odd",) and solution.results["odd"].failed == "RuntimeError: too long a prompt"


def test_small_tasks_come_first():
    tasks = [make_task("task1", side=30), make_task("task2", side=3), make_task("task3", side=12)]
    assert list(solve_tasks(StandIn(), tasks, SETTINGS, workers=1).results) == ["task2", "task3", "task1"]


def kill_after(count: int):
    """Kill this process when so many rows are written."""
    add = folder_module.SolveFolder.add

    def adding(self, result):
        add(self, result)
        if len(self.results) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    folder_module.SolveFolder.add = adding


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_killed_and_continued_ends_with_the_same_submission(tmp_path, rows):
    names = [*NAMES, "raises-1"]
    unbroken = solved_in(tmp_path / "unbroken", tasks_of(names))

    def killed() -> int:
        kill_after(rows)
        solved_in(tmp_path / "out", tasks_of(names))
        return 0

    status = os.waitpid(fork(killed, tmp_path / "output.txt"), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    # whatever ended it: every task has two attempts
    assert sorted(json.loads((tmp_path / "out" / "submission.json").read_text())) == sorted(names)
    before = (tmp_path / "out" / "results.jsonl").read_text()
    assert len(before.splitlines()) == rows
    assert solved_in(tmp_path / "out", tasks_of(names)) == unbroken
    # nothing that was done is done again
    after = [json.loads(line)["task"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (tmp_path / "out" / "results.jsonl").read_text().startswith(before)
    assert len(after) == len(names) + ("raises-1" in after[:rows])


def test_a_time_limit_ends_it_with_what_is_there_and_it_goes_on(tmp_path):
    settings = replace(SETTINGS, steps=30)
    tasks = [make_task("slow-1"), make_task("slow-2", side=4), make_task("slow-3", side=5)]
    out = tmp_path / "out"
    with solve_folder(out, {}) as folder:
        # the second one is cut short in its middle, the third not begun
        cut = solve_tasks(StandIn(), tasks, settings, folder=folder, workers=1, max_seconds=2.5)
    assert cut.results["slow-2"].cut and "slow-3" not in cut.results and cut.unanswered == ("slow-3",)
    assert sorted(json.loads((out / "submission.json").read_text())) == ["slow-1", "slow-2", "slow-3"]
    with solve_folder(out, {}) as folder:
        whole = solve_tasks(StandIn(), tasks, settings, folder=folder, workers=1)
    assert whole.results["slow-2"].answer.steps == 30 and not whole.unanswered
    assert solve_tasks(StandIn(), tasks, settings, workers=1).evaluation.to_dict() == whole.evaluation.to_dict()


def test_a_full_disk_stops_it_and_leaves_what_is_done(tmp_path, monkeypatch):
    fsync = os.fsync
    rows = []

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("results.jsonl"):
            rows.append(handle)
            if len(rows) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")
        return fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            solved_in(tmp_path / "out", tasks_of(NAMES))
    assert sorted(json.loads((tmp_path / "out" / "submission.json").read_text())) == NAMES
    assert solved_in(tmp_path / "out", tasks_of(NAMES)) == solved_in(tmp_path / "unbroken", tasks_of(NAMES))


def test_lines_say_how_far_it_is(tmp_path, capsys):
    log = SolveLog(tmp_path)
    tasks = [*tasks_of(["task1", "task2", "raises-1"]), make_task("task4", answers=False)]
    solve_tasks(StandIn(), tasks, SETTINGS, workers=1, log=log)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "solve.log").read_text().splitlines() and len(lines) == 4
    by_task = {line.split()[1]: line for line in lines}
    assert "FAILED, its query is its answer: IndexError: no such cell" in by_task["raises-1"]
    assert " not solved, sure 0.20, 3 steps in 0.0 s, loss 1.000 to 0.333, own pairs right 50 %" in by_task["task1"]
    assert " task4 answered, " in by_task["task4"]
    assert "4 of 4 tasks, 1 of 3 solved, 1 failed" in lines[-1]


@pytest.mark.parametrize("name, value", [("workers", 0), ("workers", -1), ("max_seconds", 0.0)])
def test_refuses_what_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0, got {value}"):
        solve_tasks(StandIn(), tasks_of(NAMES), SETTINGS, **{name: value})
