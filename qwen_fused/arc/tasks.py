"""ARC tasks: the types, and every grid of their JSON checked.

What is wrong is left out and said in one sentence that names file, task and pair; the rest still loads:

- a task without both keys, or with fewer good train pairs than it is wanted with, is left out;
- a bad demonstration pair: the pair is left out, the task stays while enough good pairs remain;
- a bad test input: the task is left out, because a submission counts test inputs by position;
- a bad test output: the output alone is left out, as if it had not been published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

MAX_SIDE = 30
COLORS = 10


@dataclass(frozen=True, eq=False)
class Pair:
    """An input grid and its output; the arrays are read-only."""

    input: np.ndarray  # [h, w] uint8
    output: np.ndarray | None  # [h, w] uint8, None where the answer is not known


@dataclass(frozen=True, eq=False)
class Task:
    """Demonstration pairs, all with outputs, and test pairs, whose outputs may be unknown."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class TaskCollection:
    """Tasks sorted by id, and one sentence for each thing that was left out."""

    tasks: tuple[Task, ...]
    skipped: tuple[str, ...] = ()
    unusable: tuple[Task, ...] = ()
    """Tasks that were left out though they ask something, without demonstrations: a submission names them too."""


def parse_task(task_id: str, content: Any, *, source: str, note: Callable[[str], None], min_pairs: int = 2) -> Task:
    """Check one task's JSON content.

    Args:
        task_id: the task's name, for messages and the result.
        content: {"train": [{"input": grid, "output": grid}, ...], "test": [...]}.
        source: where it came from, for messages.
        note: called with a sentence for each pair or output left out.
        min_pairs: fewest good train pairs.

    Raises:
        ValueError: the task as a whole cannot be used; the message names source, task and pair.
    """
    where = f"{source}, task {task_id}"
    parts: dict[str, list[Any]] = {}
    for part in ("train", "test"):
        if not isinstance(content, dict) or part not in content:
            raise ValueError(f'{where}: the key "{part}" is missing')
        parts[part] = content[part]
        if not isinstance(parts[part], list) or not parts[part]:
            raise ValueError(f'{where}: "{part}" must be a list of pairs, got {short(parts[part])}')

    train = []
    for number, pair in enumerate(parts["train"]):
        try:
            train.append(Pair(_member(pair, "input"), _member(pair, "output")))
        except ValueError as error:
            note(f"{where}, pair train[{number}]: {error}; the pair is left out")
    if len(train) < min_pairs:
        needed = "one is" if min_pairs == 1 else "two are" if min_pairs == 2 else f"{min_pairs} are"
        raise ValueError(f"{where}: train has {len(train)} usable of {len(parts['train'])} pairs; {needed} needed")

    test = []
    for number, pair in enumerate(parts["test"]):
        at = f"{where}, pair test[{number}]"
        try:
            query = _member(pair, "input")
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from error
        answer = None
        if pair.get("output") is not None:
            try:
                answer = _member(pair, "output")
            except ValueError as error:
                note(f"{at}: {error}; the output is left out")
        test.append(Pair(query, answer))
    return Task(task_id, tuple(train), tuple(test))


def asked_alone(task_id: str, content: Any) -> Task | None:
    """What a task asks that can't be used: its test pairs, a black cell in place of an input that is no grid.

    None where it asks nothing.
    """
    test = content.get("test") if isinstance(content, dict) else None
    if not isinstance(test, list) or not test:
        return None

    def member(pair: Any, key: str) -> np.ndarray | None:
        try:
            return _member(pair, key)
        except ValueError:
            return None

    queries = [member(pair, "input") for pair in test]
    black = np.zeros((1, 1), np.uint8)
    black.flags.writeable = False
    pairs = (Pair(black if q is None else q, member(pair, "output")) for q, pair in zip(queries, test, strict=True))
    return Task(task_id, (), tuple(pairs))


def parse_grid(value: Any) -> np.ndarray:
    """Turn a list of rows into a read-only [h, w] uint8 grid; ValueError says what is wrong with it.

    An array is one that `load_json` has found good.
    """
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise ValueError(f"must be a list of rows, got {short(value)}")
    if not value or not value[0]:
        raise ValueError("is empty")
    height, width = len(value), len(value[0])
    for y, row in enumerate(value):
        if len(row) != width:
            raise ValueError(f"is ragged: row 0 has {width} cells, row {y} has {len(row)}")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"is {height}x{width}; at most {MAX_SIDE}x{MAX_SIDE} is allowed")
    cells = list(chain.from_iterable(value))
    # without a look at each cell where all are well; bytes are read-only
    if set(map(type, cells)) == {int} and min(cells) >= 0 and max(cells) < COLORS:
        return np.frombuffer(bytes(cells), np.uint8).reshape(height, width)
    for y, row in enumerate(value):
        for x, cell in enumerate(row):
            # bool is an int to isinstance, and 1.0 would pass an == test: neither is a colour
            if type(cell) is not int:
                raise ValueError(f"has {short(cell)} at row {y}, column {x}; a colour is an integer")
            if not 0 <= cell < COLORS:
                raise ValueError(f"has colour {cell} at row {y}, column {x}; colours are 0 to {COLORS - 1}")
    raise AssertionError("a grid with a wrong cell has none")


def _member(pair: Any, key: str) -> np.ndarray:
    if not isinstance(pair, dict) or key not in pair:
        raise ValueError(f'the key "{key}" is missing')
    try:
        return parse_grid(pair[key])
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def short(value: Any) -> str:
    """A JSON value in a few words, for a sentence about it."""
    if isinstance(value, (list, np.ndarray)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
