"""The forms in which people write a task: ARC's own, a list of pairs (re-arc), BARC's examples."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_task(content: Any) -> Any | None:
    """The content as {"train": ..., "test": ...}; None where it is no task.

    A list of pairs keeps its last one to ask.
    """
    if isinstance(content, dict):
        if "train" in content or "test" in content:
            return content
        if isinstance(content.get("examples"), list):
            content = content["examples"]
    if isinstance(content, list) and content:
        pairs = [as_pair(item) for item in content]
        if all(pair is not None for pair in pairs):
            return {"train": pairs[:-1], "test": pairs[-1:]}
    return None


def as_pair(item: Any) -> dict[str, Any] | None:
    if isinstance(item, dict) and "input" in item and "output" in item:
        return item
    # BARC's: [input, output], each a list of rows
    if isinstance(item, list) and len(item) == 2 and all(_looks_like_grid(grid) for grid in item):
        return {"input": item[0], "output": item[1]}
    return None


def _looks_like_grid(item: Any) -> bool:
    return isinstance(item, np.ndarray) or (isinstance(item, list) and bool(item) and isinstance(item[0], list))


def id_of(content: Any, otherwise: str) -> str:
    for name in ("id", "task_id", "name"):
        if isinstance(content, dict) and isinstance(content.get(name), (str, int)):
            return str(content[name])
    return otherwise
