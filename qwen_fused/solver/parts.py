"""Where the answer is a part of the grid: the place that every demonstration agrees on, and the task made of it alone.

A planner moves nothing over half a grid in a few steps, and no head knows the size of an object. So where no rule gives
the answers' sizes, or a part of each input is its output, the demonstrations say which part: the box of a colour, of an
object that stands out, or a pane between lines. The planner is then shown that part and plans what becomes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from qwen_fused.arc.tasks import COLORS, Pair, Task
from qwen_fused.solver.sizes import size_rule

Box = tuple[int, int, int, int]
"""Rows from, to, columns from, to; the ends are outside."""

# what an object is told by: its own cells [h, w] bool, and the cells of its box [h, w], as seen on a background
NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "cells": lambda own, box, empty: own.sum(),
    "area": lambda own, box, empty: box.size,
    "fill": lambda own, box, empty: own.mean(),
    "colors": lambda own, box, empty: len(np.unique(box[own])),
    "marks": lambda own, box, empty: box.size - np.bincount(box.ravel()).max(),
    "holes": lambda own, box, empty: (box == empty).sum(),
}
KINDS: dict[str, Callable[[np.ndarray, np.ndarray, int], Hashable]] = {
    "content": lambda own, box, empty: (box.shape, box.tobytes()),
    "shape": lambda own, box, empty: (box.shape, (box != empty).tobytes()),
    "colors": lambda own, box, empty: tuple(np.unique(box[own]).tolist()),
    "size": lambda own, box, empty: box.shape,
    "mirrored": lambda own, box, empty: np.array_equal(box, box[:, ::-1]) or np.array_equal(box, box[::-1]),
}


def narrowed(task: Task) -> Task:
    """The task with the part of each input that its answer is in, or the task as it is where that is not known.

    Args:
        task: of its test pairs only the inputs are read.
    """
    if any(pair.input.shape == pair.output.shape for pair in task.train):  # type: ignore[union-attr]
        return task
    train, test = ([parts(pair.input) for pair in pairs] for pairs in (task.train, task.test))
    name = agreed(task, train, test)
    if name is None:
        return task

    def shown(pairs: Sequence[Pair], found: Sequence[dict[str, Box]]) -> tuple[Pair, ...]:
        both = zip(pairs, found, strict=True)
        return tuple(replace(pair, input=part_of(pair.input, boxes[name])) for pair, boxes in both)

    return replace(task, train=shown(task.train, train), test=shown(task.test, test))


def agreed(task: Task, train: Sequence[dict[str, Box]], test: Sequence[dict[str, Box]]) -> str | None:
    """The part that every input has and that is the size of the answer in every demonstration.

    Of several the one that is most like the answers, of equals the first. Where the sizes follow a rule of their own,
    the part has to be the answer itself.

    Args:
        task: its demonstrations are read.
        train, test: the parts of the inputs.
    """
    alike: dict[str, float] = {}
    for name in train[0]:
        if not all(name in found for found in (*train, *test)):
            continue
        seen = [part_of(pair.input, found[name]) for pair, found in zip(task.train, train, strict=True)]
        answers = [pair.output for pair in task.train]
        if all(part.shape == answer.shape for part, answer in zip(seen, answers, strict=True)):  # type: ignore[union-attr]
            alike[name] = float(np.mean([(part == answer).mean() for part, answer in zip(seen, answers, strict=True)]))
    best = max(alike, key=alike.__getitem__, default=None)
    return best if best and (alike[best] == 1 or not size_rule(task)) else None


def part_of(grid: np.ndarray, box: Box) -> np.ndarray:
    """The cells of a grid within a box."""
    return grid[box[0] : box[1], box[2] : box[3]]


def parts(grid: np.ndarray) -> dict[str, Box]:
    """Every part of a grid that has a name, and their insides; the plainer ones first."""
    found = {**boxes_of_colors(grid), **panes(grid)}
    for empty in dict.fromkeys([int(np.bincount(grid.ravel()).argmax()), 0]):
        name = "on 0" if empty == 0 else "on the commonest"
        plain = [mask for color in np.unique(grid) if color != empty for mask in connected(grid == color)]
        found |= outstanding(grid, connected(grid != empty), empty, f"object {name}")
        found |= outstanding(grid, plain, empty, f"object of a colour {name}")
    inner = {f"inside of {name}": (a + 1, b - 1, c + 1, d - 1) for name, (a, b, c, d) in found.items()}
    return found | {name: box for name, box in inner.items() if box[0] < box[1] and box[2] < box[3]}


def boxes_of_colors(grid: np.ndarray) -> dict[str, Box]:
    """The boxes of each colour, of the rarest ones, and of all that is not background."""
    counts = np.bincount(grid.ravel(), minlength=COLORS)
    masks = {"all but 0": grid != 0, "all but the commonest": grid != counts.argmax()}
    ranked = [color for color in counts.argsort(kind="stable") if counts[color]]
    for place, name in ((0, "rarest"), (1, "second rarest"), (-2, "second commonest")):
        if len(ranked) > max(1, abs(place)) and (counts == counts[ranked[place]]).sum() == 1:
            masks[f"{name} colour"] = grid == ranked[place]
    masks |= {f"colour {color}": grid == color for color in range(COLORS)}
    return {name: box_of(mask) for name, mask in masks.items() if mask.any()}


def panes(grid: np.ndarray) -> dict[str, Box]:
    """What lies between lines of one colour, not the commonest, that cross the whole grid."""
    counts = np.bincount(grid.ravel())
    for color in np.flatnonzero((counts > 0) & (np.arange(len(counts)) != counts.argmax())):
        whole = [np.flatnonzero((grid == color).all(axis)) for axis in (1, 0)]
        rows, columns = (spans(side, cuts) for side, cuts in zip(grid.shape, whole, strict=True))
        if 1 < len(rows) * len(columns) <= grid.size // 4:
            boxes = [(*row, *column) for row in rows for column in columns]
            masks = []
            for box in boxes:
                masks.append(np.zeros(grid.shape, bool))
                part_of(masks[-1], box)[:] = True
            found = {f"pane {place}": box for place, box in enumerate(boxes)} | {"last pane": boxes[-1]}
            return found | outstanding(grid, masks, 0, "pane")
    return {}


def spans(side: int, cuts: np.ndarray) -> list[tuple[int, int]]:
    """Runs of a side between its cuts."""
    ends = [-1, *cuts.tolist(), side]
    return [(a + 1, b) for a, b in zip(ends, ends[1:], strict=False) if b - a > 1]


def outstanding(grid: np.ndarray, masks: Sequence[np.ndarray], empty: int, name: str) -> dict[str, Box]:
    """The boxes of objects that alone have most or least of something, or are of a kind by themselves."""
    boxes = [box_of(mask) for mask in masks]
    seen = [(part_of(mask, box), part_of(grid, box), empty) for mask, box in zip(masks, boxes, strict=True)]
    found: dict[str, Box] = {}
    for what, number in NUMBERS.items():
        values = [number(*one) for one in seen]
        for most, word in ((max, "most"), (min, "least")):
            if len(values) > 1 and values.count(most(values)) == 1:
                found[f"{name}, {word} {what}"] = boxes[values.index(most(values))]
    for what, kind in KINDS.items():
        kinds = [kind(*one) for one in seen]
        counts = Counter(kinds)
        alone = [box for box, own in zip(boxes, kinds, strict=True) if counts[own] == 1]
        if len(alone) == 1 < len(boxes):
            found[f"{name}, odd {what}"] = alone[0]
        ranked = counts.most_common(2)
        if len(ranked) == 2 and ranked[0][1] > ranked[1][1]:
            found[f"{name}, commonest {what}"] = boxes[kinds.index(ranked[0][0])]
    return found


def box_of(mask: np.ndarray) -> Box:
    """The smallest box around the cells of a mask, of which there is one at least."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, corners touching, in the order of their first cells."""
    height, width = mask.shape
    nothing = mask.size
    label = np.where(mask, np.arange(mask.size).reshape(mask.shape), nothing)
    while True:
        around = np.pad(label, 1, constant_values=nothing)
        least = np.lib.stride_tricks.sliding_window_view(around, (3, 3)).min((2, 3))
        least = np.where(mask, least, nothing)
        if np.array_equal(least, label):
            return [label == number for number in np.unique(label[mask])]
        label = least
