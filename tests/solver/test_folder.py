"""A solve's folder: rows survive kills, and another solve, a stranger's folder and a second process are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from forked_workers import answer_of, make_task

from qwen_fused.solver.folder import solve_folder
from qwen_fused.solver.results import TaskResult, digest, fallback

IDENTITY = {"weights": "ab12", "steps": 150, "task_seconds": None}


def result(task, **changes) -> TaskResult:
    return TaskResult(answer_of(task), digest(task), **changes)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "a" / "solve"


def test_rows_are_there_for_the_next(out):
    tasks = [make_task(f"task{number}") for number in range(4)]
    with solve_folder(out, IDENTITY) as folder:
        assert folder.done(tasks) == {}
        folder.add(result(tasks[0]))
        folder.add(result(tasks[1], cut=True))
        folder.add(fallback(tasks[2], "it broke"))
        # a row is on disk when the next one begins
        assert len((out / "results.jsonl").read_text().splitlines()) == 3
    with solve_folder(out, IDENTITY) as folder:
        # what was cut short or failed is asked again
        assert list(folder.done(tasks)) == ["task0"]
        folder.add(result(tasks[1]))
    with solve_folder(out, IDENTITY) as folder:
        assert list(folder.done(tasks)) == ["task0", "task1"] and list(folder.done(tasks[1:])) == ["task1"]


def test_a_task_that_has_changed_is_asked_again(out):
    task = make_task("task1")
    with solve_folder(out, IDENTITY) as folder:
        folder.add(result(task))
        assert list(folder.done([task])) == ["task1"]
        assert folder.done([replace(task, train=task.train[:1])]) == {}
        # an answer that is known now changes nothing
        assert list(folder.done([replace(task, test=(replace(task.test[0], output=None),))])) == ["task1"]


@pytest.mark.parametrize("tail", [b'{"task": "task1", "ques', b"\n", b"null\n", b'{"task": "task1"}\n', b"\xff\xfe\n"])
def test_a_row_that_a_kill_cut_short_is_taken_out(out, tail):
    tasks = [make_task("task0"), make_task("task1")]
    with solve_folder(out, IDENTITY) as folder:
        folder.add(result(tasks[0]))
    with open(out / "results.jsonl", "ab") as file:
        file.write(tail)
    with solve_folder(out, IDENTITY) as folder:
        folder.add(result(tasks[1]))
    with solve_folder(out, IDENTITY) as folder:
        assert list(folder.done(tasks)) == ["task0", "task1"]
    assert len((out / "results.jsonl").read_bytes().splitlines()) == 2


def test_a_row_without_its_end_is_no_row(out):
    task = make_task("task0")
    with solve_folder(out, IDENTITY) as folder:
        folder.add(result(task))
    whole = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(whole[:-1])
    with solve_folder(out, IDENTITY) as folder:
        assert folder.done([task]) == {}


def test_another_solve_is_refused_and_told_in_what(out):
    with solve_folder(out, IDENTITY):
        pass
    with (
        pytest.raises(ValueError, match=r"steps was 150, is 40; task_seconds was null, is 2.5$") as told,
        solve_folder(out, {**IDENTITY, "steps": 40, "task_seconds": 2.5}),
    ):
        pass
    assert str(told.value).startswith(f"out must be a new folder for another solve, got {out}, where")


def test_a_folder_of_something_else_is_refused(out):
    out.mkdir(parents=True)
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="out must be a new or empty folder"), solve_folder(out, IDENTITY):
        pass
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_damaged_identity_is_told(out, content):
    with solve_folder(out, IDENTITY):
        pass
    (out / "solve.json").write_text(content)
    with pytest.raises(ValueError, match="solve.json is damaged|weights was null"), solve_folder(out, IDENTITY):
        pass


def test_a_second_process_is_refused(out):
    with (
        solve_folder(out, IDENTITY),
        pytest.raises(ValueError, match="which another process writes to"),
        solve_folder(out, IDENTITY),
    ):
        pass


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="out must be a folder that can be written to"),
        solve_folder(tmp_path / "file" / "solve", IDENTITY),
    ):
        pass


def test_what_was_half_written_is_cleared(out):
    with solve_folder(out, IDENTITY):
        (out / ".partial-x").mkdir()
    with solve_folder(out, IDENTITY):
        assert not list(out.glob(".partial-*"))
    assert json.loads((out / "solve.json").read_text()) == IDENTITY
