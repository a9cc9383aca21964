"""The pictures show the run's own numbers: each layer in its row, each size on its side of the line."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_fused.report import heatmaps


def gradient_rows(steps: int, layers: int = 3) -> list[dict]:
    names = [f"layer {k}" for k in range(layers)]
    return [
        {"step": step, "norms": {"other": 9.0} | {name: (k + 1) * step for k, name in enumerate(names)}}
        for step in range(1, steps + 1)
    ]


def test_layers_are_in_order():
    layers, steps, norms = heatmaps.gradient_matrix(gradient_rows(4, 12))
    assert layers == [f"layer {k}" for k in range(12)] + ["other"] and steps.tolist() == [1, 2, 3, 4]
    assert norms[10].tolist() == [11, 22, 33, 44] and norms[12].tolist() == [9] * 4


def test_long_runs_are_averaged():
    layers, steps, norms = heatmaps.gradient_matrix(gradient_rows(2 * heatmaps.MAX_COLUMNS))
    assert norms.shape == (4, heatmaps.MAX_COLUMNS) and steps[:3].tolist() == [1, 3, 5]
    assert norms[0, :2] == pytest.approx([np.sqrt(1 * 2), np.sqrt(3 * 4)])


def test_zero_and_missing_stay_apart_from_numbers():
    rows = gradient_rows(2 * heatmaps.MAX_COLUMNS)
    for row in rows[:4]:
        row["norms"]["layer 1"] = 0.0
    rows[0]["norms"]["layer 2"] = float("nan")
    _, _, norms = heatmaps.gradient_matrix(rows)
    assert norms[1, :2].tolist() == [0, 0] and norms[1, 2] > 0
    assert np.isnan(norms[2, 0]) and norms[2, 1] > 0
    image = heatmaps.draw_gradients(rows).axes[0].images[0]
    # what is no positive norm is masked, and so takes the warning colour
    assert np.ma.getmaskarray(np.ma.masked_invalid(image.get_array()))[1, :3].tolist() == [True, True, False]


def test_nothing_to_draw():
    assert heatmaps.draw_gradients([]) is None
    assert heatmaps.draw_gradients([{"step": 1, "norms": {"layer 0": 0.0}}]) is None
    assert heatmaps.draw_gradients([{"step": 1, "norms": {"layer 0": 2.0}}]) is not None
    assert heatmaps.draw_sizes([]) is None and heatmaps.draw_tasks([]) is None
    assert heatmaps.draw_sizes([{"answer_size": None, "attempts": [[[1]]]}]) is None


def record(task: str, cells: float, size: tuple[int, int] = (2, 2), solved: bool = False) -> dict:
    score = {"cells": cells, "copy_cells": 0.5, "size": True, "any": solved}
    return {"task_id": task, "attempts": [np.zeros((2, 3)).tolist()], "score": score, "answer_size": list(size)}


def test_sizes_right_and_wrong():
    figure = heatmaps.draw_sizes([record("a", 1.0, (2, 3)), record("b", 1.0, (2, 5)), record("c", 1.0, (2, 3))])
    height, width = figure.axes
    assert "height: 100 %" in height.get_title(loc="left") and "width: 67 %" in width.get_title(loc="left")
    right, wrong = (points.get_offsets().tolist() for points in width.collections)
    assert right == [[3, 3]] and wrong == [[5, 3]]


def test_tasks_hardest_first():
    records = [record("b", 0.9, solved=True), record("a", 0.2), record("b", 0.5), record("c", 1.0, solved=True)]
    tasks = heatmaps.task_means(records)
    assert [(t["task_id"], round(t["cells"], 3), t["solved"]) for t in tasks] == [
        ("a", 0.2, False), ("b", 0.7, False), ("c", 1.0, True)
    ]  # fmt: skip
    assert heatmaps.draw_tasks([record("a", 0.2)]) is not None
