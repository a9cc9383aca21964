"""Task files as people have them: each form loads or is refused in a sentence; nothing is ignored without a word."""

from __future__ import annotations

import copy
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from qwen_fused.arc.reader import load_tasks, splits_of

TASK = {
    "train": [{"input": [[0, 1]], "output": [[1, 0]]}, {"input": [[2]], "output": [[3]]}],
    "test": [{"input": [[4]], "output": [[5]]}],
}
PAIRS = [*TASK["train"], *TASK["test"]]


def hidden() -> dict:
    task = copy.deepcopy(TASK)
    del task["test"][0]["output"]
    return task


def put(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def ids(dataset: Path | str, split: str | None = "training", **options) -> list[str]:
    return [task.id for task in load_tasks(str(dataset), split, **options).tasks]


LINES = "\n".join(json.dumps({"id": name, **TASK}) for name in ("x", "y"))
BARC = "\n".join(json.dumps({"source": "", "examples": [[p["input"], p["output"]] for p in PAIRS]}) for _ in "ab")
FORMS = {
    "task.json": (TASK, ["task"]),
    "many.json": ({"x": TASK, "y": TASK}, ["x", "y"]),
    "list.json": ([{"id": "x", **TASK}, {"task_id": 7, **TASK}, TASK], ["7", "list-2", "x"]),
    "pairs.json": (PAIRS, ["pairs"]),
    "lines.jsonl": (LINES, ["x", "y"]),
    "barc.jsonl": (BARC, ["barc-1", "barc-2"]),
}


@pytest.mark.parametrize("packed", ["plain", "gz", "zip", "folder"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_loads_plain_and_packed(tmp_path, name, packed):
    content, expected = FORMS[name]
    file = put(tmp_path / "data" / name, content)
    if packed == "gz":
        text = file.read_bytes()
        file.unlink()
        file = file.with_name(f"{name}.gz")
        file.write_bytes(gzip.compress(text))
    elif packed == "zip":
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.write(file, f"inside/{name}")
            archive.writestr("README.md", "no task")
        file = tmp_path / "data.zip"
    loaded = load_tasks(str(file.parent if packed == "folder" else file))
    assert [task.id for task in loaded.tasks] == expected and loaded.skipped == ()
    for task in loaded.tasks:
        assert [pair.output.tolist() for pair in task.train] == [[[1, 0]], [[3]]]
        assert [pair.output.tolist() for pair in task.test] == [[[5]]]


@pytest.mark.parametrize("challenges", ["arc-agi_training_challenges", "arc-agi_training-challenges", "challenges"])
def test_solutions_are_found_however_kaggle_spells_them(tmp_path, challenges):
    put(tmp_path / f"{challenges}.json", {"x": hidden()})
    put(tmp_path / f"{challenges.replace('challenges', 'solutions')}.json", {"x": [[[5]]]})
    for dataset in (tmp_path, tmp_path / f"{challenges}.json"):
        (task,) = load_tasks(str(dataset)).tasks
        assert task.test[0].output.tolist() == [[5]]
    with pytest.raises(ValueError, match="evaluation"):
        load_tasks(str(tmp_path), "evaluation")


def test_challenges_of_any_split_load_by_its_name(tmp_path):
    for split in ("training", "test"):
        put(tmp_path / f"arc-agi_{split}_challenges.json", {f"{split}-x": hidden()})
    assert splits_of(str(tmp_path)) == ("training", "test")
    assert ids(tmp_path, "test") == ["test-x"]
    assert load_tasks(str(tmp_path), "test").tasks[0].test[0].output is None
    with pytest.raises(ValueError, match='no challenges file for split "evaluation"; it has arc-agi_test_ch'):
        load_tasks(str(tmp_path), "evaluation")


def test_folders_of_folders_load(tmp_path):
    put(tmp_path / "above.json", TASK)
    put(tmp_path / "concept" / "inner.json", TASK)
    put(tmp_path / "concept" / "deeper" / "last.json", TASK)
    put(tmp_path / ".cache" / "never.json", TASK)
    assert ids(tmp_path) == ["above", "inner", "last"] and splits_of(str(tmp_path)) == ()
    put(tmp_path / "other" / "inner.json", TASK)
    (sentence,) = load_tasks(str(tmp_path)).skipped
    assert "task inner: an earlier file has the same task; it is left out" in sentence and "other" in sentence
    put(tmp_path / "more" / "inner.json", {**TASK, "train": TASK["train"][::-1]})
    assert ids(tmp_path) == ["above", "inner", "inner-2", "last"]
    assert "another task of this name; it is called inner-2 here" in load_tasks(str(tmp_path)).skipped[0]


def test_what_holds_no_task_is_named_once(tmp_path):
    put(tmp_path / "tasks" / "a.json", PAIRS)
    put(tmp_path / "metadata.json", {"a": {"n": 3}, "b": {"n": 4}})
    put(tmp_path / "more.jsonl", f"{json.dumps(TASK)}\n[1]\n{{")
    loaded = load_tasks(str(tmp_path))
    assert [task.id for task in loaded.tasks] == ["a", "more-1"]
    assert len(loaded.skipped) == 3
    assert "metadata.json: must hold a task, {id: task}, a list of tasks" in loaded.skipped[0]
    assert (
        "line 2: must hold a task, got a list of 1" in loaded.skipped[1] and "line 3: is not JSON" in loaded.skipped[2]
    )


def test_what_lies_beside_tasks_is_named(tmp_path):
    put(tmp_path / "a.json", TASK)
    for name in ("README.md", "sub/b.json.txt", ".git/config", "c.JSON", "LICENSE"):
        put(tmp_path / name, "{}")
    (sentence,) = load_tasks(str(tmp_path)).skipped
    assert sentence == f"{tmp_path}: not read, as it is beside the tasks: LICENSE, README.md, c.JSON and 1 more"


def test_answers_that_nobody_asks_for_are_named(tmp_path):
    put(tmp_path / "arc-agi_test_challenges.json", {"x": hidden()})
    for name in ("arc-agi_evaluation_solutions.json", "sample_submission.json"):
        put(tmp_path / name, {"x": [[[5]]]})
    (sentence,) = load_tasks(str(tmp_path), None).skipped
    assert sentence.endswith("not read, as it is beside the tasks: arc-agi_evaluation_solutions.json")


def test_tasks_that_lie_together_are_no_evaluation_split(tmp_path):
    file = put(tmp_path / "a.json", TASK)
    for dataset in (tmp_path, file):
        with pytest.raises(ValueError, match='has no split "evaluation": its tasks lie together'):
            load_tasks(str(dataset), "evaluation")
        assert ids(dataset, None) == ["a"]


def test_the_folder_above_the_splits_is_told_where_they_are(tmp_path):
    put(tmp_path / "data" / "training" / "a.json", TASK)
    put(tmp_path / "data" / "evaluation" / "b.json", TASK)
    with pytest.raises(ValueError, match="try .*data$"):
        load_tasks(str(tmp_path))
    assert splits_of(str(tmp_path / "data")) == ("training", "evaluation")
    with pytest.raises(ValueError, match='has no split "test"; it has training, evaluation'):
        load_tasks(str(tmp_path / "data"), "test")


def test_several_sources_are_one_data_set(tmp_path):
    first, second = put(tmp_path / "a.json", TASK), put(tmp_path / "b.json", TASK)
    assert ids(f"{first}, {second}") == ["a", "b"]
    assert len(ids(f"arc1,{second}")) == 401
    # of sources without that split nothing is in it; without a split each gives what it has
    loaded = load_tasks(f"arc1,{second}", "evaluation")
    assert len(loaded.tasks) == 400 and 'b.json has no split "evaluation"' in loaded.skipped[0]
    assert len(ids(f"arc1,{second}", None)) == 401
    # a comma in a name is a name
    assert ids(put(tmp_path / "c,d.json", TASK)) == ["c,d"]


@pytest.mark.parametrize("name", ["ARC1", "arc-agi-1", "ARC_1"])
def test_a_slip_in_arc1_is_told(name):
    with pytest.raises(ValueError, match=r"which does not exist(; did you mean arc1\?)"):
        load_tasks(name)


def test_one_demonstration_is_enough_to_answer(tmp_path):
    file = put(tmp_path / "a.json", {"x": TASK, "y": {**TASK, "train": TASK["train"][:1]}})
    loaded = load_tasks(str(file))
    assert [task.id for task in loaded.tasks] == ["x"] and "two are needed" in loaded.skipped[0]
    (left_out,) = loaded.unusable
    assert left_out.id == "y" and left_out.train == () and left_out.test[0].output.tolist() == [[5]]
    assert ids(file, min_pairs=1) == ["x", "y"]


def test_a_task_that_is_left_out_still_counts_its_inputs(tmp_path):
    wrong = {"train": [], "test": [{"input": [[1, 2]]}, {"input": "?"}]}
    loaded = load_tasks(str(put(tmp_path / "a.json", {"good": TASK, "wrong": wrong, "empty": {"train": []}})))
    (left_out,) = loaded.unusable
    # a query that is no grid is a black cell
    assert left_out.id == "wrong" and [pair.input.tolist() for pair in left_out.test] == [[[1, 2]], [[0]]]


@pytest.mark.parametrize(
    ("name", "data"), [("a.json.gz", b"no gzip"), ("a.zip", b"no zip"), ("b.json.gz", b"\x1f\x8b")]
)
def test_damaged_archives_are_named(tmp_path, name, data):
    put(tmp_path / "good.json", TASK)
    (tmp_path / name).write_bytes(data)
    loaded = load_tasks(str(tmp_path))
    assert [task.id for task in loaded.tasks] == ["good"]
    assert name in loaded.skipped[0] and "cannot be read" in loaded.skipped[0]
