"""What the trainer writes of an example is what the report reads, and what cannot be drawn is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_fused.report.answers import Example, read_examples, write_examples


def make(**changes) -> Example:
    example = {
        "task_id": "t",
        "index": np.int64(1),
        "input": np.array([[1, 2]], np.uint8),
        "target": np.array([[3], [4]]),
        "predicted": np.array([[3], [5]]),
        "plan": (np.zeros((2, 2), np.int64),),
        "backward": (np.full((1, 2), 6, np.uint8), np.array([[7], [8]])),
        "demonstrations": ((np.ones((1, 1), np.uint8), np.array([[2]])),),
        "why": "hardest",
    }
    example.update(changes)
    return Example(**{key: value for key, value in example.items() if value is not ...})


def test_round_trip(tmp_path):
    path = tmp_path / "examples.json"
    write_examples(path, [make(), make(target=None, plan=..., backward=..., demonstrations=..., why=...)])
    first, second = read_examples(json.loads(path.read_text()), "examples.json")
    assert (first.task_id, first.index) == ("t", 1)
    assert first.input.tolist() == [[1, 2]] and first.target.tolist() == [[3], [4]]
    assert first.predicted.tolist() == [[3], [5]] and first.plan[0].tolist() == [[0, 0], [0, 0]]
    assert [[grid.tolist() for grid in pair] for pair in first.demonstrations] == [[[[1]], [[2]]]]
    assert [(caption, grid.tolist()) for caption, grid, _ in first.backward_row] == [
        ("made back", [[6, 6]]), ("back 1", [[7], [8]])
    ]  # fmt: skip
    assert first.why == "hardest" and second.why == "" and second.backward_row == []
    assert second.target is None and second.plan == () and second.demonstrations == ()
    assert [file.name for file in tmp_path.iterdir()] == ["examples.json"]


def test_keys_may_be_left_out_of_a_file():
    least = {"task_id": "t", "index": 0, "input": [[1]], "target": None, "predicted": [[2]]}
    (example,) = read_examples([least], "examples.json")
    assert (example.plan, example.backward, example.demonstrations, example.why) == ((), (), (), "")
    for key in least:
        short = {name: value for name, value in least.items() if name != key}
        with pytest.raises(ValueError, match=r"x\[1\] must have task_id, index, input, target, predicted, got "):
            read_examples([least, short], "x")


def test_verdict_and_row():
    wrong, right, open_ = read_examples(
        [
            {
                "task_id": "t",
                "index": 0,
                "input": [[1]],
                "target": target,
                "predicted": [[3, 4]],
                "plan": [[[1]], [[2]]],
            }
            for target in ([[3, 5], [0, 0]], [[3, 4]], None)
        ],
        "x",
    )
    assert (wrong.verdict, wrong.solved) == ("25.0 % of cells right", False)
    assert (right.verdict, right.solved) == ("solved", True)
    assert (open_.verdict, open_.solved) == ("no answer known", False)
    names = [caption for caption, _, _ in wrong.row]
    assert names == ["input", "step 1", "step 2", "predicted", "target", "errors"]
    assert [caption for caption, _, _ in open_.row] == names[:4]
    assert wrong.row[-1][1].shape == (2, 2)


@pytest.mark.parametrize(("side", "cell"), [(1, 18), (10, 11), (30, 3)])
def test_cells_are_of_a_size_that_fits(side, cell):
    grid = np.zeros((1, side), int).tolist()
    (example,) = read_examples([{"task_id": "t", "index": 0, "input": [[1]], "target": grid, "predicted": [[1]]}], "x")
    assert example.cell == cell


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": np.full((1, 1), 10)}, r"examples\[1\], predicted: the grid has colour 10"),
        ({"input": np.zeros((31, 1), int)}, r"examples\[1\], input: the grid is 31x1"),
        ({"input": np.zeros((1, 1))}, "a colour is an integer"),
        ({"plan": (np.zeros((0, 3), int),)}, r"examples\[1\], plan: the grid is empty"),
        ({"demonstrations": ((np.ones((1, 1), int),),)}, r"examples\[1\], demonstrations must be pairs"),
    ],
)
def test_rejects_what_cannot_be_drawn(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_examples(tmp_path / "examples.json", [make(), make(**changes)])
    assert not list(tmp_path.iterdir())
