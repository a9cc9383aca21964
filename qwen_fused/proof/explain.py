"""Why a parameter gets no gradient, a gradient of zero, or one that is not finite: the operation and its line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qwen_fused.proof import backtrace
from qwen_fused.proof.cuts import Cut, Event, Trace
from qwen_fused.proof.frames import NOWHERE, Frame
from qwen_fused.proof.ladder import Finding, name_some
from qwen_fused.proof.replay import Nudge, ReplayMismatch
from qwen_fused.proof.subject import Subject, as_float

# departures whose value is a number that can be moved a little
NUMBERS = ("item", "tolist", "numpy")


def disconnected(subject: Subject, trace: Trace, missing: list[str]) -> tuple[list[Finding], list[Cut]]:
    """Why each missing parameter gets no gradient, those with one reason together."""
    labels = trace.labels
    bit = {name: 1 << i for i, name in enumerate(labels.names)}
    through = labels.values(trace.loss) if isinstance(trace.loss, Tensor) else 0
    alive = labels.alive(trace.loss) if isinstance(trace.loss, Tensor) else 0
    fresh = {trace.named_after.get(id(p)): site for p, site in trace.fresh}
    by_line: dict[tuple[str, Frame], tuple[Event, list[str]]] = {}
    graph: list[str] = []
    replaced: list[str] = []
    unused: list[str] = []
    dropped: list[str] = []
    ends = None
    for name in missing:
        if alive & bit[name]:
            graph.append(name)
            continue
        if name in fresh:
            replaced.append(name)
            continue
        events = [e for e in trace.reaching if e.lost & bit[name]] if through & bit[name] else []
        if not events:
            if ends is None:
                ends = _ends(subject, trace)
            events = [e for e in ends if e.lost & bit[name]]
        if events:
            event = events[0]
            by_line.setdefault((event.kind, event.site.user), (event, []))[1].append(name)
        else:
            (dropped if trace.used & bit[name] else unused).append(name)
    findings, cuts = _in_backward(subject, graph) if graph else ([], [])

    def order(pair: tuple[Event, list[str]]) -> tuple[bool, int]:
        # what the given backward can carry on from is no cut by itself: another one then stands behind it
        return pair[0].carried and subject.own_backward, pair[0].order

    for event, names in sorted(by_line.values(), key=order):
        cut = event.cut(labels, sum(bit[n] for n in names))
        cuts.append(cut)
        where = f", first lost at {cut.at}" if cut.at else ""
        detail = f"{cut.operation} loses {name_some(names)}{where}"
        findings.append(Finding(cut.kind, detail, tuple(names), cut.frame, cut.inside))
    for line in dict.fromkeys(fresh[name].user for name in replaced):
        there = tuple(name for name in replaced if fresh[name].user == line)
        detail = f"{name_some(there)} is replaced by a new parameter when the loss function is called"
        findings.append(Finding("replaced", detail, there, line, fresh[there[0]].inside))
    if unused:
        detail = f"no operation of the loss function reads {name_some(unused)}"
        findings.append(Finding("unused", detail, tuple(unused)))
    if dropped:
        detail = f"{name_some(dropped)} is read, but the loss does not depend on what is computed from it"
        findings.append(Finding("dropped", detail, tuple(dropped)))
    return findings, cuts


def _ends(subject: Subject, trace: Trace) -> list[Event]:
    """Where values left tensors for good: those that come back into the loss, else the last that nothing followed."""
    numbers = [e for e in trace.departures if e.kind in NUMBERS]
    if not isinstance(trace.loss, Tensor) and numbers:
        return numbers[-1:]
    # integers and branches can't be moved a little
    ends = [e for e in trace.departures if not e.continues and e.kind != "text"]
    return returning(subject, trace, most=6) or ends[-1:]


def returning(subject: Subject, trace: Trace, most: int) -> list[Event]:
    """Values that left tensors and come back into the loss, found by moving them, the last few of them."""
    found: list[Event] = []
    candidates = [e for e in trace.departures if e.kind in NUMBERS]
    seen: set[Any] = set()
    base = None
    for event in reversed(candidates):
        if event.slot is None or event.site.user in seen or len(seen) >= most:
            continue
        seen.add(event.site.user)
        try:
            base = subject.value() if base is None else base
            moved = as_float(subject.call({event.slot: Nudge(0.01)}))
        except (ReplayMismatch, RuntimeError, ValueError):
            continue
        if moved != base:
            found.append(event)
    return found


def _in_backward(subject: Subject, names: list[str]) -> tuple[list[Finding], list[Cut]]:
    """Parameters in the graph that backward gives nothing to: some operation's backward returns None."""
    findings, cuts = [], []
    broken, rest = _breaks(subject, names, backtrace.NONE)
    for brk, hit in broken:
        kind = "custom function" if brk.is_custom else "non-differentiable"
        user = brk.site.user
        cuts.append(Cut(kind, brk.operation, user.file, user.line, user.function, hit, brk.site.inside))
        detail = f"the backward of {brk.operation} returns None for {name_some(hit)}"
        findings.append(Finding(kind, detail, hit, user, brk.site.inside))
    if rest:
        detail = f"{name_some(rest)} is in the graph, yet backward delivers nothing; what swallows it can't be seen"
        findings.append(Finding("unseen", detail, rest))
    return findings, cuts


def _breaks(
    subject: Subject, names: Iterable[str], status: str
) -> tuple[list[tuple[backtrace.Break, tuple[str, ...]]], tuple[str, ...]]:
    """The breaks of one status, each with those of the names that it is the first to stop, and the names left over."""
    found = subject.watched_call(backtrace.follow_backward, subject.trainable, subject.backward)
    subject.snapshot.clear_gradients()
    broken, left = [], tuple(names)
    for brk in found:
        hit = tuple(name for name in left if name in brk.parameters)
        if brk.status == status and hit:
            broken.append((brk, hit))
            left = tuple(name for name in left if name not in hit)
    return broken, left


def _blame(
    subject: Subject, names: tuple[str, ...], status: str, kind: str, blame: str, otherwise: str
) -> list[Finding]:
    """A finding for each break of one status, and one for the names that no break explains.

    Args:
        blame: sentence with {operation} and {names}.
        otherwise: sentence with {names}.
    """
    broken, rest = _breaks(subject, names, status)
    findings = []
    for brk, hit in broken:
        detail = blame.format(operation=brk.operation, names=name_some(hit))
        findings.append(Finding(kind, detail, hit, brk.site.user, brk.site.inside))
    if rest:
        findings.append(Finding(kind, otherwise.format(names=name_some(rest)), rest))
    return findings


def zero(subject: Subject, dead: tuple[str, ...]) -> list[Finding]:
    """Which operation gives each of the parameters zeros, here and one small step on."""
    blame = "{operation} passes only zeros on to {names}, and still does one step on"
    otherwise = "{names} is connected, with a gradient of exactly zero"
    return _blame(subject, dead, backtrace.ZERO, "zero", blame, otherwise)


def nonfinite(subject: Subject, bad: tuple[str, ...], loss: Any) -> list[Finding]:
    """Which operation first gives NaN or Inf: of the forward pass where the loss is either, else of the backward."""
    if isinstance(loss, Tensor) and not loss.isfinite():
        found = subject.watched_call(backtrace.first_nonfinite)
        operation, site = found or ("the loss", NOWHERE)
        detail = f"{operation} first gave NaN or Inf; the loss is {as_float(loss)}, and {name_some(bad)} got no better"
        return [Finding("non-finite", detail, bad, site.user if found else None, site.inside)]
    blame = "the backward of {operation} gives NaN or Inf to {names}"
    otherwise = "the gradient of {names} has NaN or Inf"
    return _blame(subject, bad, backtrace.NONFINITE, "non-finite", blame, otherwise)
