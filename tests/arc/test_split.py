"""Which tasks train: whole tasks, whatever the order; a list of ids; tasks of one content on one side."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from random_tasks import make_tasks

from qwen_fused.arc.split import divide, names, same_content, shared_tasks, split_tasks, spread


def test_split_holds_out_whole_tasks_whatever_the_order():
    tasks = make_tasks(50)
    training, held_out = split_tasks(tasks, 0.1, 0)
    assert len(held_out) == 5
    assert sorted(task.id for task in training + held_out) == [task.id for task in tasks]
    again = split_tasks(tasks[::-1], 0.1, 0)
    assert [task.id for task in again[1]] == [task.id for task in held_out]
    assert [task.id for task in split_tasks(tasks, 0.1, 1)[1]] != [task.id for task in held_out]
    # the same in every process: python's own hash() would not be
    assert [int(task.id[4:]) for task in held_out] == [1, 2, 25, 36, 44]
    # growing the held-out part only adds to it
    assert {task.id for task in held_out} < {task.id for task in split_tasks(tasks, 0.3, 0)[1]}


def test_split_edges():
    tasks = make_tasks(4)
    assert split_tasks(tasks, 0.0, 0) == (tuple(tasks), ())
    assert len(split_tasks(tasks, 0.01, 0)[1]) == 1
    with pytest.raises(ValueError, match="fraction must leave a task to train on, got"):
        split_tasks(tasks, 0.99, 0)
    with pytest.raises(ValueError, match="different ids, got task001"):
        split_tasks([*tasks, tasks[1]], 0.5, 0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1.0"):
        split_tasks(tasks, 1.0, 0)


def ids(tasks) -> list[str]:
    return [task.id for task in tasks]


def test_tasks_of_one_content_stay_together_and_are_named():
    tasks = make_tasks(30)
    # a copy of a held-out task, a relative of the copy, and two of the training side
    copy = replace(tasks[25], id="copy")
    relative = replace(tasks[7], id="relative", train=(*tasks[7].train, tasks[25].train[0]))
    twin = replace(tasks[3], id="twin")
    tasks = [*tasks, copy, relative, twin]
    assert same_content(tasks) == [("copy", "relative", tasks[7].id, tasks[25].id), (tasks[3].id, "twin")]
    for seed in range(20):
        training, held_out = split_tasks(tasks, 0.2, seed)
        assert shared_tasks(training, held_out) == () and len(training + held_out) == len(tasks)
        # as many as asked for, or fewer by what did not fit whole
        assert 3 <= len(held_out) <= 7
    (note,) = divide(tasks, 0.2, 0).notes
    assert f"copy = relative = {tasks[7].id} = {tasks[25].id}; {tasks[3].id} = twin" in note
    assert divide(make_tasks(9), 0.2, 0).notes == ()


def test_copies_of_a_data_set_can_still_be_divided():
    tasks = [replace(task, id=f"{task.id}-{copy}") for copy in range(3) for task in make_tasks(20)]
    training, held_out = split_tasks(tasks, 0.1, 0)
    assert len(held_out) == 6 and shared_tasks(training, held_out) == ()
    one = [replace(make_tasks(1)[0], id=str(number)) for number in range(5)]
    with pytest.raises(ValueError, match="no task can be held out, since all 5 share pairs"):
        split_tasks(one, 0.2, 0)
    assert split_tasks(one, 0, 0) == (tuple(one), ())


@pytest.mark.parametrize("write", ["\n".join, json.dumps, lambda ids: "\ufeff" + "\r\n".join(ids) + "\r\n\r\n"])
def test_a_list_of_ids_is_held_out(tmp_path, write):
    tasks = make_tasks(6)
    wanted = [tasks[4].id, tasks[1].id]
    (tmp_path / "ids").write_text(write(wanted), "utf-8")
    division = divide(tasks, 0.5, 0, tmp_path / "ids")
    assert ids(division.held_out) == sorted(wanted) and len(division.training) == 4
    # a task that shares a pair with one of them is not trained on
    twin = replace(tasks[1], id="twin")
    division = divide([*tasks, twin], 0.5, 0, tmp_path / "ids")
    assert ids(division.held_out) == sorted([*wanted, "twin"]) and "= twin" in division.notes[0]


@pytest.mark.parametrize(
    "content, told",
    [
        ("task001\nnobody\n", "held_out must list tasks of the data set, got nobody in "),
        ("\n", "held_out must be a file of task ids, one a line or a JSON list, got "),
        (json.dumps([f"task00{k}" for k in range(4)]), "held_out must leave a task to train on, got all 4 in "),
        (b"\xff\xfe\x00", "held_out must be a file of task ids, got "),
        (None, "held_out must be a file of task ids, got "),
    ],
)
def test_a_list_that_cannot_be_held_out_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / "ids").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        divide(make_tasks(4), 0.25, 0, tmp_path / "ids")
    assert str(error.value).startswith(told)


def test_spread_and_names():
    assert list(spread(range(10), 3)) == [0, 3, 6] and list(spread(range(3), 3)) == [0, 1, 2]
    assert names(list("abc")) == "a, b, c" and names(list("abcd"), 2) == "a, b and 2 more"
