"""A trainer's own attributes, its counters and lists of metrics included, put back after a proof has run its step."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from qwen_fused.common.random_state import RandomState

# exactly these: a subclass may do more than hold on being filled
_CONTAINERS = (dict, defaultdict, OrderedDict, list, set, deque)


@contextmanager
def kept_random() -> Iterator[None]:
    """Put the random generators of Python, NumPy and torch back on leaving."""
    drawn = random.getstate(), np.random.get_state()
    try:
        with RandomState.now().again():
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


@contextmanager
def kept(*holders: Any) -> Iterator[None]:
    """Put the holders' attributes, and the plain containers in them, back on leaving.

    Tensors and modules in them are left to the proof's own snapshot.
    """
    attributes = [(holder, dict(vars(holder))) for holder in holders]
    containers: dict[int, tuple[Any, Any]] = {}
    for _, own in attributes:
        _collect(list(own.values()), containers)
    try:
        yield
    finally:
        for holder, own in attributes:
            vars(holder).clear()
            vars(holder).update(own)
        for container, entries in containers.values():
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(entries)


@contextmanager
def overridden(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Give one object another method for a while."""
    undo = override(owner, name, value)
    try:
        yield
    finally:
        undo()


def override(owner: Any, name: str, value: Callable[..., Any]) -> Callable[[], None]:
    """Give one object another method; returns what takes it away again."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)

    return undo


def _collect(values: list[Any], found: dict[int, tuple[Any, Any]]) -> None:
    for value in values:
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value, value.copy()
            _collect(list(value.values() if isinstance(value, dict) else value), found)
