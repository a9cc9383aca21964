"""Task files, checkpoints and model folders with anything changed: refused or left out in a sentence, or unharmed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import unequal

from qwen_fused.arc.reader import load_tasks
from qwen_fused.qwen.backbone import load_backbone, save_backbone
from qwen_fused.train.checkpoint import read_state, write_state

GRID = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=3)
)
PAIR = st.fixed_dictionaries({"input": GRID, "output": GRID})
TASK = st.fixed_dictionaries({
    "train": st.lists(PAIR, min_size=2, max_size=4), "test": st.lists(PAIR, min_size=1, max_size=2),
})  # fmt: skip
WRONG = st.sampled_from(
    [None, True, -1, 10, 255, 256, 2**64, 0.0, 1.5, math.nan, math.inf, "", "0", [], [[]], {}, [[0], [0, 0]], [[10]],
     [[0] * 31], [[0]] * 31, [[None]], [["0"]], [[[0]]], [0], {"input": [[0]]}, "x" * 200]
)  # fmt: skip


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in places(item, (*at, key)))]


def good_grid(grid: Any) -> bool:
    """Apart from the parser under test: rows of equal length, 1 to 30, of integers 0 to 9."""
    return (
        isinstance(grid, list) and 1 <= len(grid) <= 30 and all(isinstance(row, list) for row in grid)
        and len({len(row) for row in grid}) == 1 and 1 <= len(grid[0]) <= 30
        and all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)
    )  # fmt: skip


def wrong_pairs(content: Any) -> int | None:
    """How many pairs of a task are wrong; None where it is no task."""
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("train", "test")):
        return None

    def good(pair: Any, may_lack_output: bool) -> bool:
        if not isinstance(pair, dict) or not good_grid(pair.get("input")):
            return False
        return good_grid(pair.get("output")) or (may_lack_output and pair.get("output") is None)

    return sum(not good(pair, part == "test") for part in ("train", "test") for pair in content[part])


@settings(deadline=None, max_examples=350, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_is_wrong_with_a_task_is_said(tmp_path_factory, data):
    content = data.draw(TASK)
    for _ in range(data.draw(st.integers(0, 2))):
        *path, last = data.draw(st.sampled_from([place for place in places(content) if place]))
        holder = content
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(WRONG)
        else:
            del holder[last]
        if not any(content.values()):
            break
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_text(json.dumps(content))
    try:
        loaded = load_tasks(str(file))
    except ValueError as error:
        assert "fuzzed.json" in str(error) and "\n" not in str(error)
        enough = wrong_pairs(content)
        assert enough or enough is None or len(content["train"]) < 2 or not content["test"], (content, str(error))
        return
    (task,) = loaded.tasks
    assert len(task.train) >= 2 and len(task.test) == len(content["test"])
    for pair in task.train + task.test:
        for grid in (pair.input, pair.output):
            assert grid is None or (grid.dtype == np.uint8 and good_grid(grid.tolist()))
    # one sentence for each pair that is wrong, naming file, task and pair; none where nothing is
    assert len(loaded.skipped) == wrong_pairs(content)
    assert all("fuzzed.json, task fuzzed, pair t" in sentence for sentence in loaded.skipped)
    kept = [pair for pair in content["train"] if wrong_pairs({"train": [pair], "test": []}) == 0]
    assert [pair.input.tolist() for pair in task.train] == [pair["input"] for pair in kept]


CORPUS = (Path(__file__).with_name("corpus") / "tasks.jsonl").read_text().splitlines()


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_of_tasks(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        load_tasks(str(tmp_path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[bytes, dict, Path]:
    """A checkpoint's bytes, what is in it, and where to put changed ones."""
    state = {
        "model": {"w": torch.arange(40.0).view(8, 5), "half": torch.ones(3).bfloat16(), "empty": torch.empty(0)},
        "optimizer": {0: {"step": torch.tensor(3.0)}, "list": [1, 2.5, None, True, "é"]},
    }
    path = tmp_path_factory.mktemp("fuzz") / "step-000001.safetensors"
    write_state(path, state)
    return path.read_bytes(), read_state(path), path


CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "swap", "zero", "text"]), st.floats(0, 1, exclude_max=True),
              st.integers(0, 255)), min_size=1, max_size=3
)  # fmt: skip


def change(content: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """Bytes with something changed at a place, given as a share of their length, by a number."""
    for kind, share, number in changes:
        place, part = int(share * len(content)), bytes([number])
        content = {
            "flip": content[:place] + bytes(b ^ 1 << number % 8 for b in content[place:][:1]) + content[place + 1 :],
            "cut": content[:place],
            "insert": content[:place] + part + content[place:],
            "swap": content[place:] + content[:place],
            "zero": content[:place] + bytes(number) + content[place + number :],
            "text": content.replace(b"sha256", b"sha257", 1) if number % 2 else content.replace(b"F32", b"I32", 1),
        }[kind]
    return content


@settings(deadline=None, max_examples=300)
@given(CHANGES)
def test_changed_checkpoint_is_refused_or_the_same(saved, changes):
    content, state, path = saved
    path.write_bytes(change(content, changes))
    try:
        assert unequal(state, read_state(path)) is None
    except ValueError as error:
        assert "step-000001.safetensors" in str(error)


def test_every_bit_of_a_checkpoint_counts(saved):
    content, state, path = saved
    taken = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert unequal(state, read_state(path)) is None
            taken += 1
        except ValueError:
            pass
    assert taken <= 1, "only a blank that fills the header up may change"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    save_backbone(*load_backbone("tiny"), folder)
    return folder


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_model_folder_is_refused_in_a_sentence(model_folder, tmp_path_factory, data):
    whole = load_backbone("tiny")[0].state_dict()
    folder = tmp_path_factory.getbasetemp() / "changed-qwen"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    file = folder / data.draw(st.sampled_from(files))
    how = data.draw(st.sampled_from(["missing", "key", "value", "bytes", "folder"]))
    if how == "missing":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "bytes" or file.suffix != ".json":
        # within the header, or cut: a weight's own bits no format guards
        content = file.read_bytes()
        head = min(len(content), 2000)
        file.write_bytes(change(content[:head], data.draw(CHANGES)) + content[head:])
    else:
        content = json.loads(file.read_text())
        key = data.draw(st.sampled_from(sorted(content)))
        if how == "key":
            del content[key]
        else:
            content[key] = data.draw(WRONG.filter(lambda x: x == x))
        file.write_text(json.dumps(content))
    try:
        backbone, tokenizer = load_backbone(str(folder))
    except ValueError as error:
        assert str(error).startswith("qwen") and "\n" not in str(error), error
        return
    # what is taken is a Qwen all the same, whole, and can read a grid
    assert backbone.state_dict().keys() == whole.keys()
    assert tokenizer.decode(tokenizer("07\n", add_special_tokens=False)["input_ids"]) == "07\n"
