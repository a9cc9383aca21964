"""Grids are taken out of JSON whole: nothing else of it changes, no bad grid passes, and 10,000 tasks load in 3 s."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_fused.arc.grid_json import load_json
from qwen_fused.arc.reader import load_tasks


def plain(value):
    """Arrays as the lists they stand for."""
    if isinstance(value, np.ndarray):
        assert value.dtype == np.uint8 and not value.flags.writeable
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


cell = st.integers(0, 9) | st.sampled_from([10, -1, 12, 1.0, 8.0, 88.1, True, None, "3", '"', "[[1]]", "\\"])
grid = st.lists(st.lists(st.integers(0, 9) | cell, max_size=4), max_size=4)
document = st.recursive(grid | cell, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(document, st.sampled_from([None, 1]), st.booleans())
def test_says_what_json_says(content, indent, ascii):
    text = json.dumps(content, indent=indent, ensure_ascii=ascii).encode(errors="surrogatepass")
    assert plain(load_json(text)) == json.loads(text)


@pytest.mark.parametrize("text", ["[[1]]", "[ [ 1 , 2 ] ,\r\n\t[3,4] ]", "[[0,0],[9,9]]", "[[[8,8]],[[8]]]"])
def test_good_grids_are_arrays(text):
    found = load_json(text.encode())
    outer = found if isinstance(found, list) else [found]
    assert all(isinstance(item, np.ndarray) for item in outer) and plain(found) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["[[1],[1,2]]", "[[10]]", "[[]]", "[[ ]]", "[[-1]]", "[[1.0]]", "[[true]]", '"[[1]]"', '{"[[1]]": "\\"[[1]]"}',
     json.dumps([[0] * 31]), json.dumps([[0]] * 31), "[[12],[34]]", "[[1,23],[4,56]]"],
)  # fmt: skip
def test_what_is_no_good_grid_stays_as_it_is(text):
    found = load_json(text.encode())
    assert found == json.loads(text) and not isinstance(found, np.ndarray)


@pytest.mark.parametrize(
    "text", ["[[1 2]]", "[[01]]", "[[1,,2]]", "[[1,]]", "[[1],]", "[[1] [2]]", '{"a": [[1]]', "[[1]]]"]
)
def test_what_is_no_json_is_told_at_its_own_place(text):
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    with pytest.raises(ValueError) as told:
        load_json(text.encode())
    assert str(told.value) == str(expected.value)


def test_ten_thousand_tasks_load_in_three_seconds(tmp_path):
    rng = np.random.default_rng(0)

    def pair() -> dict:
        return {name: rng.integers(0, 10, (13, 13)).tolist() for name in ("input", "output")}

    # as many cells as ARC's tasks have; a fifth of the tasks in a fifth of the time
    tasks = {str(k): {"train": [pair() for _ in range(3)], "test": [pair()]} for k in range(2000)}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        assert len(load_tasks(str(tmp_path / "tasks.json")).tasks) == 2000
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.6
