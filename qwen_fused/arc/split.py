"""Which tasks train and which are held out: by a hash of their ids or by a list; tasks of one content on one side."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwen_fused.arc.tasks import Task

T = TypeVar("T")

# ids that a sentence names
NAMED = 8


@dataclass(frozen=True)
class Division:
    """Training and held-out tasks, each sorted by id, and a sentence for what had to be moved."""

    training: tuple[Task, ...]
    held_out: tuple[Task, ...]
    notes: tuple[str, ...] = ()


def divide(tasks: Iterable[Task], fraction: float, seed: int, listed: Path | None = None) -> Division:
    """Training and held-out tasks of a run.

    Args:
        tasks: tasks with different ids.
        fraction, seed: as for `split_tasks`.
        listed: file of the ids to hold out, in place of both: one a line, or a JSON list.

    Raises:
        ValueError: as `split_tasks`, or the file cannot be read, or names a task that is not there.
    """
    tasks = sorted(tasks, key=lambda task: task.id)
    groups = same_content(tasks)
    notes = []
    if groups:
        named = "; ".join(" = ".join(group) for group in groups[:NAMED])
        more = f"; and {len(groups) - NAMED} more groups" if len(groups) > NAMED else ""
        notes.append(f"Tasks that share a pair are kept on one side, all trained on or all held out: {named}{more}.")
    if listed is None:
        return Division(*split_tasks(tasks, fraction, seed), tuple(notes))
    wanted = set(read_ids(listed))
    unknown = sorted(wanted - {task.id for task in tasks})
    if unknown:
        raise ValueError(
            f"held_out must list tasks of the data set, got {names(unknown)} in {listed}, which are none of its "
            f"{len(tasks)} training tasks"
        )
    chosen = wanted.union(*(group for group in groups if wanted & set(group)))
    if len(chosen) == len(tasks):
        raise ValueError(f"held_out must leave a task to train on, got all {len(tasks)} in {listed}")
    return Division(*_sides(tasks, chosen), tuple(notes))


def split_tasks(tasks: Iterable[Task], fraction: float, seed: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Divide whole tasks into training and held-out ones.

    Tasks are ranked by a hash of seed and id, so the order of loading changes nothing, and a task that comes
    or goes moves hardly any other. Tasks that share a pair are ranked as the first of them, and stay together.

    Args:
        tasks: tasks with different ids.
        fraction: share to hold out, in [0, 1); rounded to whole tasks, at least one unless it is 0. Where tasks that
            share a pair would be more than that, they are trained on.
        seed: which division.

    Returns:
        (training, held-out), each sorted by id.

    Raises:
        ValueError: an id comes twice, the fraction is out of range, or no training or no held-out task would remain.
    """
    tasks = sorted(tasks, key=lambda task: task.id)
    twice = [task_id for task_id, count in Counter(task.id for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(f"tasks must have different ids, got {twice[0]} more than once")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    count = max(1, round(fraction * len(tasks))) if fraction else 0
    if count >= len(tasks):
        raise ValueError(f"fraction must leave a task to train on, got {fraction} of {len(tasks)} tasks")
    together = {group[0]: group for group in same_content(tasks)}
    followers = {task_id for group in together.values() for task_id in group[1:]}
    # python's own hash() differs from process to process
    ranked = sorted(
        (task.id for task in tasks if task.id not in followers),
        key=lambda task_id: hashlib.sha256(f"{seed}:{task_id}".encode()).digest(),
    )
    held_out: set[str] = set()
    for first in ranked:
        group = together.get(first, (first,))
        if len(held_out) + len(group) <= count:
            held_out.update(group)
    if count and not held_out:
        raise ValueError(
            f"no task can be held out, since all {len(tasks)} share pairs with others: --val-fraction 0 trains on all"
        )
    return _sides(tasks, held_out)


def same_content(tasks: Iterable[Task]) -> list[tuple[str, ...]]:
    """Groups of tasks that share a pair, directly or through others of the group; sorted ids, each in one group."""
    parent: dict[str, str] = {}

    def first(task_id: str) -> str:
        while parent.setdefault(task_id, task_id) != task_id:
            parent[task_id] = parent[parent[task_id]]
            task_id = parent[task_id]
        return task_id

    owner: dict[tuple, str] = {}
    for task in tasks:
        for pair in pairs_of(task):
            one, other = sorted((first(task.id), first(owner.setdefault(pair, task.id))))
            parent[other] = one
    groups: dict[str, list[str]] = {}
    for task_id in parent:
        groups.setdefault(first(task_id), []).append(task_id)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def shared_tasks(training: Iterable[Task], evaluation: Iterable[Task]) -> tuple[str, ...]:
    """Ids of evaluation tasks that have a pair in common with the training tasks, under whatever name.

    Scores on them say nothing: of ARC-AGI-1's 400 evaluation tasks 376 are in ARC-AGI-2's training set, and one
    is in ARC-AGI-1's own (070dd51e, there called 40853293).
    """
    seen = set().union(*map(pairs_of, training))
    return tuple(sorted(task.id for task in evaluation if pairs_of(task) & seen))


def pairs_of(task: Task) -> set[tuple]:
    """The task's pairs whose outputs are known, by their content."""
    known = ((pair.input, pair.output) for pair in task.train + task.test if pair.output is not None)
    return {(a.shape, a.tobytes(), b.shape, b.tobytes()) for a, b in known}


def read_ids(path: Path) -> list[str]:
    """Ids from a file: a JSON list of them, or one a line.

    Raises:
        ValueError: it cannot be read, or names none.
    """
    try:
        text = path.expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"held_out must be a file of task ids, got {path}: {reason}") from None
    try:
        found = json.loads(text)
        ids = [str(item) for item in found] if isinstance(found, list) else text.split("\n")
    except ValueError:
        ids = text.split("\n")
    ids = [task_id.strip() for task_id in ids if task_id.strip()]
    if not ids:
        raise ValueError(f"held_out must be a file of task ids, one a line or a JSON list, got {path}, which has none")
    return ids


def spread(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of the items, spread evenly over them."""
    if len(items) <= most:
        return items
    return [items[place * len(items) // most] for place in range(most)]


def names(ids: Sequence[str], most: int = NAMED) -> str:
    """`a, b, c and 5 more`."""
    shown = ", ".join(ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def _sides(tasks: Sequence[Task], held_out: set[str]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    return (
        tuple(task for task in tasks if task.id not in held_out),
        tuple(task for task in tasks if task.id in held_out),
    )
