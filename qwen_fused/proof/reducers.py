"""Gradients that DistributedDataParallel waits for in vain, and without which it won't go forward a second time."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def among_processes() -> bool:
    """Whether processes train together here."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if among_processes() else 1


def finish_reduction(delivered: Iterable[Tensor]) -> None:
    """Send zeros back to parameters that a backward pass left out, so that a reduction of gradients comes to its end.

    Without them the wrapper's own error at the next forward, which names no parameter, would take the place of what a
    proof finds; and the other processes would wait where one alone leaves a parameter out. Wrappers that don't wait
    take no notice.

    Args:
        delivered: parameters that the pass gave a gradient; the others have none afterwards, as before.
    """
    if not among_processes():
        return
    reached = {id(parameter) for parameter in delivered}
    waiting = [p for wrapper in _waiting_wrappers() for p in wrapper.module.parameters() if id(p) not in reached]
    waiting = [parameter for parameter in waiting if parameter.requires_grad and parameter.grad is None]
    if not waiting:
        return
    with torch.enable_grad():
        torch.stack([parameter.sum().real.double() for parameter in waiting]).sum().mul(0).backward()
    for parameter in waiting:
        parameter.grad = None


def _waiting_wrappers() -> Iterator[DistributedDataParallel]:
    """Wrappers that were not told that parameters may be left out: the loss function knows them, the caller names none.

    Those that were told take a gradient that comes late for a fault of their own.
    """
    wrappers = (found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel))
    yield from (found for found in wrappers if not (found.find_unused_parameters or found.static_graph))
