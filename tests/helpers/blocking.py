"""Reads of a tensor's value by the host: on a GPU it waits there, and fake tensors hide them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# what makes a number, or a size, of a tensor's contents
BLOCKING = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2)


class _Spy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in BLOCKING:
            frames = traceback.extract_stack()[:-1]
            line = next(frame for frame in reversed(frames) if "/torch/" not in frame.filename)
            self.seen.append(f"{func} at {line.filename}:{line.lineno}")
        return func(*args, **(kwargs or {}))


@contextmanager
def blocking_reads() -> Iterator[list[str]]:
    """What was read meanwhile, each as op and line."""
    with _Spy() as spy:
        yield spy.seen
