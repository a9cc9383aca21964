"""The folder of a solve: what it was asked with, a row per task as it is done, and the submission, whole at any time.

solve.json is what the answers depend on; results.jsonl has a row per task (`TaskResult.to_plain`), in the order in
which they were done, and where a task has two the last one counts. A solve goes on with the tasks that have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen_fused.arc.tasks import Task
from qwen_fused.common.files import lock_folder, remove_partial, write_atomic
from qwen_fused.solver.results import TaskResult, digest

IDENTITY, RESULTS, SUBMISSION = "solve.json", "results.jsonl", "submission.json"


class SolveFolder:
    """A folder that holds a solve, or will.

    Args:
        path: the folder.
        results: what is done already, by task.
    """

    def __init__(self, path: Path, results: dict[str, TaskResult]):
        self.path, self.results = path, results
        self._rows = open(path / RESULTS, "a")  # noqa: SIM115

    def add(self, result: TaskResult) -> None:
        """Write a row, so that it is there whatever happens next."""
        self._rows.write(json.dumps(result.to_plain(), allow_nan=False) + "\n")
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self.results[result.answer.task_id] = result

    def done(self, tasks: Iterable[Task]) -> dict[str, TaskResult]:
        """Results of these tasks that need not be asked again: the task is what it was, and was answered."""
        found = {task.id: self.results[task.id] for task in tasks if task.id in self.results}
        return {task.id: found[task.id] for task in tasks if task.id in found and _holds(found[task.id], task)}

    def close(self) -> None:
        """Close the file of rows."""
        # a row that found no room was told when it was written
        with suppress(OSError):
            self._rows.close()


@contextmanager
def solve_folder(path: Path, identity: Mapping[str, Any]) -> Iterator[SolveFolder]:
    """Make a folder for a solve, or go on in it; one process at a time.

    Args:
        path: a new or empty folder, or one of a solve with the same identity.
        identity: what the answers depend on besides the tasks, flat and plain.

    Raises:
        ValueError: something else is in the folder, or the solve there was another one; the message says in what.
        OSError: it cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to, got {path}: {error.strerror}") from None
    with lock_folder(path):
        remove_partial(path)
        if (path / IDENTITY).is_file():
            check_identity(path, identity)
        elif any(path.iterdir()):
            raise ValueError(f"out must be a new or empty folder, or the folder of a solve, got {path}")
        else:
            write_atomic(path / IDENTITY, json.dumps(identity, indent=2) + "\n")
        folder = SolveFolder(path, read_results(path / RESULTS))
        try:
            yield folder
        finally:
            folder.close()


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise a ValueError that says what differs where the solve in a folder was another one."""
    try:
        before = dict(json.loads((path / IDENTITY).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"out must be the folder of a solve, got {path}: its {IDENTITY} is damaged: {error}") from None
    # as JSON gives it back
    now = json.loads(json.dumps(identity))
    changes = [
        f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(f"out must be a new folder for another solve, got {path}, where {'; '.join(changes)}")


def read_results(path: Path) -> dict[str, TaskResult]:
    """The rows of results.jsonl by task, the last one of each; rows that a kill cut short are taken out of the file."""
    if not path.exists():
        return {}
    results, whole = {}, []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            result = TaskResult.from_plain(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if line.endswith(b"\n"):
            results[result.answer.task_id] = result
            whole.append(line)
    if len(whole) < len(lines):
        write_atomic(path, b"".join(whole))
    return results


def _holds(result: TaskResult, task: Task) -> bool:
    return result.final and result.question == digest(task)
