"""A cut beside a way that still connects: how much of the gradient is lost by it.

The loss is measured along random directions: with everything held still that autograd takes as constant, and with the
results of the cut let go. What differs is what the cut loses. A `detach` or a `no_grad` is how a gradient is stopped on
purpose, and what it takes is told; a cut that nobody wrote down, a `create_graph` that was forgotten say, is doubted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Event, PartialCut, Trace
from qwen_fused.proof.departures import NUMBERS, returning
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.kinds import WRITTEN
from qwen_fused.proof.ladder import MOST_LOST, Finding, Rung, name_some
from qwen_fused.proof.noise_directions import Loss, NoiseDirections
from qwen_fused.proof.reducers import processes
from qwen_fused.proof.replay import Held, NormalDraw
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Subject, as_float
from qwen_fused.proof.trusted_ops import Point

# kinds of a cut whose result has no derivative to lose
DISCRETE = ("argmax", "comparison", "integer cast")
# lines that are weighed one by one, each at the cost of four evaluations; those behind them together, and if that is
# much one by one too, so many
WEIGHED, MORE = 4, 12


def partial_cuts(subject: Subject, trace: Trace, *, count: bool) -> list[Event]:
    """Cuts that the loss lies behind, of parameters that it is connected to another way, and that are not allowed.

    An index or a mask that a library makes is no news: it has no derivative to lose.
    """
    events = [e for e in trace.reaching if e.lost & trace.alive and not e.carried]
    events = [e for e in events if not (e.kind in DISCRETE and e.site.inside is not None)]
    return [e for e in events if not subject.allow.event(e, count=count)]


@dataclass
class Weighed:
    """What the cuts beside a way that connects were found to take.

    Args:
        cuts: those that were weighed.
        returned: values that left tensors and come back into the loss.
    """

    cuts: list[PartialCut] = field(default_factory=list)
    returned: list[Event] = field(default_factory=list)


def weigh_partial_cuts(subject: Subject, point: Point, connected: Rung, base: Mapping[str, Tensor]) -> Weighed:
    """Measure what each cut beside a way that connects takes of the gradient, the first few of them.

    Where nobody wrote the cut down and it takes more than a tenth, the second rung is not judged.
    """
    if connected.ok is not True or not point.gradients.of:
        return Weighed()
    trace = point.trace
    cuts, returned = partial_cuts(subject, trace, count=False), returning(subject, trace, most=3)
    for event in cuts:
        if event.kind == "collective in place":
            detail = f"{event.operation} writes over a tensor that carries a gradient, and autograd is not told of it"
            _doubt(connected, Finding(event.kind, detail, _names(trace, [event]), event.site.user, event.site.inside))
    places = {(event.operation, event.site.user) for event in returned}
    lines = _by_line(trace, [*cuts, *(e for e in trace.departures if (e.operation, e.site.user) in places)])
    weighed, stopped = [], 0
    for event in trace.reaching:
        stopped |= event.stops
    for events, share, unknown in _weighed(subject, point, lines, base) if lines else ():
        first, names = events[0], _names(trace, events)
        # of what other processes send nobody expects a gradient; what comes back from this one alone is lost
        sent = first.kind == "collective" and processes() > 1
        weighed.append(PartialCut(first.operation, first.site.user, share, names, "" if sent else unknown))
        written = first.kind in (*WRITTEN, *NUMBERS) or all(stopped & event.bit for event in events)
        if share > MOST_LOST and not sent and not written:
            detail = f"{first.operation} loses {share:.0%} of the gradient on one way, "
            detail += f"another way connects {name_some(names)}"
            _doubt(connected, Finding("partial cut", detail, names, first.site.user, first.site.inside))
    return Weighed(weighed, returned)


def _doubt(connected: Rung, finding: Finding) -> None:
    connected.ok = None
    connected.detail += f"; {finding.detail}"
    connected.findings.append(finding)


def unweighed(subject: Subject, trace: Trace, why: str) -> Weighed:
    """The cuts beside a way that connects, where the loss function can't be called again to weigh them."""
    lines = _by_line(trace, partial_cuts(subject, trace, count=False))
    cuts = [PartialCut(e[0].operation, e[0].site.user, math.nan, _names(trace, e), why) for e in lines]
    return Weighed(cuts)


def _by_line(trace: Trace, events: Iterable[Event]) -> list[list[Event]]:
    """Events that lose something that a gradient could be of, those of one line together."""
    lines: dict[tuple[str, Frame], list[Event]] = {}
    for event in events:
        if event.kind not in DISCRETE and event.slot is not None and event.lost & trace.alive:
            lines.setdefault((event.operation, event.site.user), []).append(event)
    return list(lines.values())


def _names(trace: Trace, events: Sequence[Event]) -> tuple[str, ...]:
    """Parameters that the cuts lose on one way and that another connects."""
    label = 0
    for event in events:
        label |= event.lost & trace.alive
    return trace.labels.names_of(label)


def _weighed(
    subject: Subject, point: Point, lines: list[list[Event]], base: Mapping[str, Tensor]
) -> list[tuple[list[Event], float, str]]:
    """The first few lines with what they take, and those behind them where they take something together."""
    first, rest = lines[:WEIGHED], lines[WEIGHED : WEIGHED + MORE]
    together = [[event for events in rest for event in events]] if rest else []
    found = _shares_lost(subject, point, first + together, base)
    if together and found.pop()[0] > MOST_LOST:
        found += _shares_lost(subject, point, rest, base)
        first += rest
    return [(events, *share) for events, share in zip(first, found, strict=True)]


def _shares_lost(
    subject: Subject, point: Point, lines: Sequence[Sequence[Event]], base: Mapping[str, Tensor]
) -> list[tuple[float, str]]:
    """The part of the gradient by the parameters concerned that each line loses, or NaN and why it can't be had."""
    trace = point.trace
    if trace.exchanges:
        return [(math.nan, "the loss is computed by several processes together")] * len(lines)
    held: dict[Slot, Held] = {**trace.held(carried=subject.own_backward), **point.linearized}
    judged = {name: g for name, g in point.gradients.before_changes().items() if name in subject.trainable}

    def without(events: Sequence[Event], wide: torch.dtype | None) -> Loss:
        slots = {event.slot for event in events}
        released = {slot: _let_go(record) for slot, record in held.items() if slot not in slots}
        return Loss(_names(trace, events), subject.evaluation(trace, released, wide))

    found: list[Loss] = []
    # its own precision is enough for a share, and quicker; 16 bits are too coarse, and other threads' work can't be had
    # in another type
    for wide in (*(() if trace.half else (None,)), *(() if trace.threads else (torch.float64,))):
        asked = [n for n in range(len(lines)) if not found or found[n].unknown]
        losses = [without(lines[n], wide) for n in asked]
        if losses:
            directions = NoiseDirections(subject.trainable, judged, losses[0].evaluate, torch.float32, wide, 0, base)
            try:
                directions.measure(losses, as_float(point.loss))
            finally:
                directions.restore()
        found = [losses[asked.index(n)] if n in asked else loss for n, loss in enumerate(found)] or losses
    return [_share_of(loss) for loss in found] or [(math.nan, "")] * len(lines)


def _share_of(loss: Loss) -> tuple[float, str]:
    if loss.unknown:
        return math.nan, loss.unknown
    share, left = loss.shares
    # a way that pulls against the others may be more than the whole
    return (min(1.0, share) if left > MOST_LOST else math.nan), ""


def _let_go(record: Held) -> Held:
    """What is drawn around a mean follows the mean, once nothing is cut."""
    return record.following() if isinstance(record, NormalDraw) else record
