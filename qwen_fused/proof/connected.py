"""The second rung: backward delivers to every parameter; if not, the operation that loses it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qwen_fused.proof import backtrace
from qwen_fused.proof.backtrace import breaks_of
from qwen_fused.proof.cuts import Cut, Event, Trace
from qwen_fused.proof.departures import NUMBERS, returning
from qwen_fused.proof.failed_backward import failing_call, reason_of
from qwen_fused.proof.frames import NOWHERE, Frame
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.nonzero import is_flat
from qwen_fused.proof.other_draws import skipped_by_this_draw
from qwen_fused.proof.partial_cuts import DISCRETE
from qwen_fused.proof.subject import Gradients, Subject


def connected(subject: Subject, trace: Trace, gradients: Gradients) -> tuple[Rung, Cut | None]:
    """Every parameter is given a gradient; if not, the operation that loses it."""
    if gradients.error is not None:
        reason = reason_of(gradients.error)
        findings = []
        # with a graph left over from an earlier call, that is the fault, and the last rung's
        if not trace.stale:
            site = failing_call(subject)
            line = None if site is NOWHERE else site.user
            findings = [Finding("backward failed", reason, tuple(subject.trainable), line, site.inside)]
        return Rung("connected", False if findings else None, f"backward raised: {reason}", findings), None
    trainable = subject.trainable
    missing = [n for n in trainable if n not in gradients.of and not subject.allow.name(n)]
    if not trainable:
        return Rung("connected", None, "no parameter asks for a gradient"), None
    skipped = skipped_by_this_draw(subject, trace, missing) if missing else []
    if skipped:
        subject.notes.append(f"{name_some(skipped)} is skipped by this draw, and reached by another: judged without it")
        missing = [name for name in missing if name not in skipped]
    if missing and (left_out := _constants_of_derivatives(subject, trace, missing)):
        subject.notes.append(
            f"the loss takes a derivative that {name_some(left_out)} drops out of: it gets no gradient"
        )
        missing = [name for name in missing if name not in left_out]
    if not missing:
        return Rung("connected", True, f"backward delivers to {len(gradients.of)} of {len(trainable)} parameters"), None
    findings, cuts = _explain(subject, trace, missing)
    detail = f"{len(missing)} of {len(trainable)} parameters get no gradient: {name_some(missing)}"
    return Rung("connected", False, detail, findings), cuts[0] if cuts else None


def _constants_of_derivatives(subject: Subject, trace: Trace, missing: Sequence[str]) -> list[str]:
    """Those that a derivative in the loss does not depend on, as an energy's last bias drops out of its forces."""
    names = [name for name in missing if trace.differentiated & trace.labels.bit_of(name)]
    # with nothing else connected it is the graph of the derivative that is missing
    return names if names and len(missing) < len(subject.trainable) and is_flat(subject, names) else []


def _explain(subject: Subject, trace: Trace, missing: Sequence[str]) -> tuple[list[Finding], list[Cut]]:
    """Why each missing parameter gets no gradient, those with one reason together."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    losing: dict[str, Event] = {}
    departures = _LazyEnds(subject, trace)
    for name in missing:
        reason = _reason(trace, name, losing, departures)
        by_reason[reason].append(name)
    findings, cuts = _lost_in_backward(subject, by_reason["in the graph"]) if by_reason["in the graph"] else ([], [])
    of_events, cuts_of_events = _lost_at_events(subject, trace, losing)
    findings += of_events + _replaced(trace, by_reason["replaced"])
    if unused := tuple(by_reason["unused"]):
        findings.append(Finding("unused", f"no operation of the loss function reads {name_some(unused)}", unused))
    if dropped := tuple(by_reason["dropped"]):
        detail = f"{name_some(dropped)} is read, but the loss does not depend on what is computed from it"
        findings.append(Finding("dropped", detail, dropped))
    return findings, cuts + cuts_of_events


def _reason(trace: Trace, name: str, losing: dict[str, Event], departures: _LazyEnds) -> str:
    """Why one parameter gets no gradient; where an event loses it, the event is put into `losing`."""
    labels = trace.labels
    bit = labels.bit_of(name)
    lost = any(event.lost & bit for event in trace.reaching)
    # labels lie on storages; where a cut lost it too, the graph itself decides
    if trace.alive & bit and not (lost and not labels.reached_from(trace.loss) & bit):
        return "in the graph"
    if name in _replacements(trace):
        return "replaced"
    events = [e for e in trace.reaching if e.lost & bit] if trace.depends_on & bit else []
    # an index or a mask never carries a gradient: where another cut loses it too, that one is the fault
    events.sort(key=lambda event: event.kind in DISCRETE)
    events = events or [e for e in departures.found() if e.lost & bit]
    if events:
        losing[name] = events[0]
        return "lost"
    return "dropped" if trace.used & bit else "unused"


class _LazyEnds:
    """Where values left tensors for good, looked for only when something asks."""

    def __init__(self, subject: Subject, trace: Trace):
        self._given = subject, trace
        self._found: list[Event] | None = None

    def found(self) -> list[Event]:
        """Those that come back into the loss, else the last that nothing followed."""
        if self._found is None:
            self._found = _ends(*self._given)
        return self._found


def _lost_at_events(subject: Subject, trace: Trace, losing: dict[str, Event]) -> tuple[list[Finding], list[Cut]]:
    """A finding and a cut for each line that loses parameters, in the order of the calls."""
    by_line: dict[tuple[str, Frame], tuple[Event, list[str]]] = {}
    for name, event in losing.items():
        by_line.setdefault((event.kind, event.site.user), (event, []))[1].append(name)

    def order(pair: tuple[Event, list[str]]) -> tuple[bool, int]:
        # what the given backward can carry on from is no cut by itself: another one then stands behind it
        return pair[0].carried and subject.own_backward, pair[0].order

    findings, cuts = [], []
    for event, names in sorted(by_line.values(), key=order):
        cut = event.cut(trace.labels, sum(trace.labels.bit_of(name) for name in names))
        cuts.append(cut)
        where = f", first lost at {cut.at}" if cut.at else ""
        detail = f"{cut.operation} loses {name_some(names)}{where}"
        findings.append(Finding(cut.kind, detail, tuple(names), cut.frame, cut.inside))
    return findings, cuts


def _replacements(trace: Trace) -> dict[str | None, Any]:
    """Name of a parameter -> where the loss function made another in its place."""
    return {trace.named_after.get(id(p)): site for p, site in trace.fresh}


def _replaced(trace: Trace, names: Sequence[str]) -> list[Finding]:
    sites = _replacements(trace)
    findings = []
    for line in dict.fromkeys(sites[name].user for name in names):
        there = tuple(name for name in names if sites[name].user == line)
        detail = f"{name_some(there)} is replaced by a new parameter when the loss function is called"
        findings.append(Finding("replaced", detail, there, line, sites[there[0]].inside))
    return findings


def _ends(subject: Subject, trace: Trace) -> list[Event]:
    """Where values left tensors for good: those that come back into the loss, else the last that nothing followed."""
    numbers = [e for e in trace.departures if e.kind in NUMBERS]
    if not isinstance(trace.loss, Tensor) and numbers:
        return numbers[-1:]
    # integers and branches can't be moved a little
    ends = [e for e in trace.departures if not e.continues and e.kind != "text"]
    return returning(subject, trace, most=6) or ends[-1:]


def _lost_in_backward(subject: Subject, names: list[str]) -> tuple[list[Finding], list[Cut]]:
    """Parameters in the graph that backward gives nothing to: some operation's backward returns None."""
    findings, cuts = [], []
    broken, rest = breaks_of(subject, names, backtrace.NONE)
    for brk, hit in broken:
        kind = "custom function" if brk.is_custom else "non-differentiable"
        user = brk.site.user
        cuts.append(Cut(kind, brk.operation, user.file, user.line, user.function, hit, brk.site.inside))
        detail = f"the backward of {brk.operation} returns None for {name_some(hit)}"
        findings.append(Finding(kind, detail, hit, user, brk.site.inside))
    if rest:
        detail = f"{name_some(rest)} is in the graph, yet backward delivers nothing; what swallows it can't be seen"
        if subject.own_backward:
            detail = f"{name_some(rest)} is in the graph, yet the backward that was given leaves it without a gradient"
        findings.append(Finding("unseen", detail, rest))
    return findings, cuts
