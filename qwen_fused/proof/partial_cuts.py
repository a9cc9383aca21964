"""A cut beside a way that still connects: how much of the gradient is lost by it.

The loss is measured along one direction twice: with everything held still that autograd takes as constant, and with the
results of the cut let go. What differs is what the cut loses. A `detach` or a `no_grad` is how a gradient is stopped on
purpose, and what it takes is told; a cut that nobody wrote down, a `create_graph` that was forgotten say, is doubted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Event, PartialCut, Trace
from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.kinds import WRITTEN
from qwen_fused.proof.ladder import MOST_LOST, Finding, Rung, name_some
from qwen_fused.proof.reducers import processes
from qwen_fused.proof.replay import Held, NormalDraw
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Subject
from qwen_fused.proof.trusted_ops import Point

# kinds of a cut whose result has no derivative to lose
DISCRETE = ("argmax", "comparison", "integer cast")
# cuts that are weighed, each at the cost of two evaluations
WEIGHED = 4


def partial_cuts(subject: Subject, trace: Trace, *, count: bool) -> list[Event]:
    """Cuts that the loss lies behind, of parameters that it is connected to another way, and that are not allowed.

    An index or a mask that a library makes is no news: it has no derivative to lose.
    """
    events = [e for e in trace.reaching if e.lost & trace.alive and not e.carried]
    events = [e for e in events if not (e.kind in DISCRETE and e.site.inside is not None)]
    return [e for e in events if not subject.allow.event(e, count=count)]


def weigh_partial_cuts(subject: Subject, point: Point, connected: Rung, base: Mapping[str, Tensor]) -> list[PartialCut]:
    """Measure what each cut beside a way that connects takes of the gradient, the first few of them.

    Where nobody wrote the cut down and it takes more than a tenth, the second rung is not judged.
    """
    if connected.ok is not True or not point.gradients.of:
        return []
    lines: dict[tuple[str, Frame], list[Event]] = {}
    for event in partial_cuts(subject, point.trace, count=False):
        if event.kind not in DISCRETE and event.slot is not None:
            lines.setdefault((event.operation, event.site.user), []).append(event)
        elif event.kind == "collective in place":
            detail = f"{event.operation} writes over a tensor that carries a gradient, and autograd is not told of it"
            connected.ok = None
            connected.detail += f"; {detail}"
            names = point.trace.labels.names_of(event.lost & point.trace.alive)
            connected.findings.append(Finding(event.kind, detail, names, event.site.user, event.site.inside))
    weighed = []
    for (operation, frame), events in list(lines.items())[:WEIGHED]:
        label = 0
        for event in events:
            label |= event.lost & point.trace.alive
        names = point.trace.labels.names_of(label)
        share = math.nan if point.trace.exchanges else _share_lost(subject, point, events, names, base)
        weighed.append(PartialCut(operation, frame, share, names))
        # of what other processes send nobody expects a gradient; what comes back from this one alone is lost
        written = events[0].kind in WRITTEN or (events[0].kind == "collective" and processes() > 1)
        if share > MOST_LOST and not written:
            detail = f"{operation} loses {share:.0%} of the gradient on one way, "
            detail += f"another way connects {name_some(names)}"
            connected.ok = None
            connected.detail += f"; {detail}"
            connected.findings.append(Finding("partial cut", detail, names, frame, events[0].site.inside))
    return weighed


def _share_lost(
    subject: Subject, point: Point, events: list[Event], names: Sequence[str], base: Mapping[str, Tensor]
) -> float:
    """The part of the loss's derivative by the named parameters that the cuts lose; NaN if it can't be had."""
    slots = {event.slot for event in events}
    held: dict[Slot, Held] = {**point.trace.held(carried=subject.own_backward), **point.linearized}
    released = {slot: _let_go(record) for slot, record in held.items() if slot not in slots}
    judged = {name: g for name, g in point.gradients.of.items() if name in subject.trainable}
    evaluate = subject.evaluation(point.trace, released, torch.float64)
    lines = Directions(subject.trainable, judged, evaluate, torch.float32, torch.float64, 0, base)
    try:
        share, left = lines.change_along(0, names)
        # a way that pulls against the others may be more than the whole
        return min(1.0, share) if left > MOST_LOST else math.nan
    except Exception:
        # what can't be computed in float64, or makes other calls, is told as a note
        return math.nan
    finally:
        lines.restore()


def _let_go(record: Held) -> Held:
    """What is drawn around a mean follows the mean, once nothing is cut."""
    return record.following() if isinstance(record, NormalDraw) else record
