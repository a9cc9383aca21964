"""A cut beside a way that still connects: how much of the gradient is lost by it.

The loss is measured along one direction twice: with everything held still that autograd takes as constant, and with the
results of the cut let go. What differs is what the cut loses. Only cuts that nobody wrote down as such are weighed, a
`create_graph` that was forgotten say: `detach` and `no_grad` are how a gradient is stopped on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Event, Trace
from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.replay import Held
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Subject
from qwen_fused.proof.trusted_ops import Point

# kinds of a cut that are written on purpose, or whose result has no derivative to lose
WRITTEN = ("detach", "no_grad", "decorated no_grad", "inference_mode", "requires_grad", "data")
DISCRETE = ("argmax", "comparison", "integer cast")
# share of the gradient beyond which a loss that nobody wrote down is no longer called proved
MOST_LOST = 0.1
# cuts that are weighed, each at the cost of two evaluations
WEIGHED = 4


def partial_cuts(subject: Subject, trace: Trace, *, count: bool) -> list[Event]:
    """Cuts that the loss lies behind, of parameters that it is connected to another way, and that are not allowed.

    An index or a mask that a library makes is no news: it has no derivative to lose.
    """
    events = [e for e in trace.reaching if e.lost & trace.alive and not e.carried]
    events = [e for e in events if not (e.kind in DISCRETE and e.site.inside is not None)]
    return [e for e in events if not subject.allow.event(e, count=count)]


def weigh_partial_cuts(subject: Subject, point: Point, connected: Rung, base: Mapping[str, Tensor]) -> None:
    """Call the second rung not judged where a cut that nobody wrote down loses more than a tenth of the gradient."""
    if connected.ok is not True or not point.gradients.of:
        return
    lines: dict[tuple[str, str, int], list[Event]] = {}
    for event in partial_cuts(subject, point.trace, count=False):
        if event.kind not in (*WRITTEN, *DISCRETE) and event.slot is not None:
            user = event.site.user
            lines.setdefault((event.operation, user.file, user.line), []).append(event)
    for events in list(lines.values())[:WEIGHED]:
        share = _share_lost(subject, point, events, base)
        if not share > MOST_LOST:
            continue
        event, label = events[0], 0
        for other in events:
            label |= other.lost & point.trace.alive
        names = point.trace.labels.names_of(label)
        detail = (
            f"{event.operation} loses {share:.0%} of the gradient on one way, another way connects {name_some(names)}"
        )
        connected.ok = None
        connected.detail += f"; {detail}"
        connected.findings.append(Finding("partial cut", detail, names, event.site.user, event.site.inside))


def _share_lost(subject: Subject, point: Point, events: list[Event], base: Mapping[str, Tensor]) -> float:
    """The part of the loss's derivative that flows through the cuts, relative to the whole; NaN if it can't be had."""
    slots = {event.slot for event in events}
    held: dict[Slot, Held] = {**point.trace.held(carried=subject.own_backward), **point.linearized}
    released = {slot: record for slot, record in held.items() if slot not in slots}
    judged = {name: g for name, g in point.gradients.of.items() if name in subject.trainable}
    evaluate = subject.evaluation(point.trace, released, torch.float64)
    lines = Directions(subject.trainable, judged, evaluate, torch.float32, torch.float64, 0, base)
    try:
        return abs(lines.deviation_along(0))
    except Exception:
        # what can't be computed in float64, or makes other calls, is told as a note
        return math.nan
    finally:
        lines.restore()
