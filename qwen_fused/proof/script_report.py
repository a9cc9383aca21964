"""The ladder of a script's first step: the rungs that can be judged from having seen it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof import backtrace, rungs
from qwen_fused.proof.backtrace import Break
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.frames import NOWHERE, Frame, Site
from qwen_fused.proof.ladder import Finding, ProofReport, Rung, name_some
from qwen_fused.proof.script_names import name_parameters
from qwen_fused.proof.script_trace import SITE, joint_loss
from qwen_fused.proof.script_watch import FirstStep
from qwen_fused.proof.step import HALF, _masters
from qwen_fused.proof.subject import Allowance, Gradients, Subject

UNASKED = "not asked: a script is run once (qf.prove and the callbacks ask it)"


class _Once(Subject):
    """A subject that has been run already: what the rungs ask of it is read from what was seen."""

    def __init__(
        self,
        named: dict[str, Tensor],
        modules: dict[str, nn.Module],
        optimizers: list[torch.optim.Optimizer],
        allow: Iterable[str],
        breaks: list[Break],
    ):
        self.named = named
        self.modules = modules
        self.optimizers = optimizers
        self.allow = Allowance(allow)
        self.own_backward = False
        self.snapshot: Any = _Untouched()
        self.backward = lambda loss: None
        self._breaks = breaks

    def value(self, *held: Any, **more: Any) -> float:
        # whoever asks for a second evaluation takes this for one that can't be had
        raise RuntimeError("a script is run once")

    def watched_call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._breaks if function is backtrace.follow_backward else None


class _Untouched:
    def clear_gradients(self) -> None:
        """Nothing was run, so nothing is left behind."""


def report_of(seen: FirstStep, allow: Iterable[str]) -> ProofReport:
    """The ladder.

    Args:
        seen: a first step, or a backward pass that failed before it.
        allow: as in `prove`.
    """
    judged = seen.stepped or seen.optimizers
    held = seen.trainable(judged)
    known = {id(p) for o in seen.optimizers for group in o.param_groups for p in group["params"]}
    strays = {key: p for key, p in seen.reached.items() if key not in known and p.requires_grad}
    frozen = {id(p): p for o in judged for g in o.param_groups for p in g["params"] if not p.requires_grad}
    spare = {
        id(p): f"parameter {place} of group {number} of {type(optimizer).__name__}"
        for optimizer in seen.optimizers
        for number, group in enumerate(optimizer.param_groups)
        for place, p in enumerate(group["params"])
    }
    names, modules = name_parameters({**held, **strays, **frozen}, seen.variables, spare)
    named = {names[key]: p for key, p in {**held, **strays}.items()}
    trace = _trace_of(seen, {**{id(p): spare.get(id(p), "<other>") for p in seen.tracer.labels.known}, **names})
    subject = _Once(named, modules, judged, allow, _breaks_of(seen, named))

    given = {names[key]: grad for key, grad in seen.gradients.items() if key in names}
    delivered = {name: p for name, p in named.items() if id(p) in seen.delivered or id(p) in strays or name in given}
    later = {names[key]: grad for key, grad in seen.later.items() if key in names}
    delivered |= {name: named[name] for name in later if name in named}
    gradients = {name: given[name] for name in named if name in given}
    erased = {n: p for n, p in named.items() if _is_erased(seen, id(p)) and id(p) in held}
    # a loss without a graph fails too, but that is for the cut to explain
    error = None if seen.stepped or seen.hopeless else seen.failed
    connected, cut = rungs.connected(subject, trace, Gradients(of=delivered, error=error))
    left = {name: grad for name, grad in gradients.items() if name not in erased}
    loss = torch.tensor(0.0 if seen.loss is None else seen.loss)
    ladder = [
        rungs.declared(subject),
        connected,
        rungs.nonzero(subject, Gradients(of=left), later, loss),
        Rung("correct", None, UNASKED, asked=False),
        _applied(seen, subject, left, erased),
    ]
    return ProofReport(
        rungs={rung.name: rung for rung in ladder},
        cut=cut,
        notes=_notes(seen, subject, trace, [names[key] for key in frozen]),
        allowed=dict(subject.allow.matches),
        layers=rungs.layers(gradients),
        parameters=len(named),
        loss=seen.loss,
        evaluations=seen.losses,
    )


def _trace_of(seen: FirstStep, names: Mapping[int, str]) -> Trace:
    trace = seen.tracer.trace
    seen.tracer.labels.rename(names)
    trace.named_after = dict(names)
    trace.loss = joint_loss(trace.labels, seen.values, seen.cuts, seen.alive)
    return trace


def _is_erased(seen: FirstStep, key: int) -> bool:
    """Whether backward gave it a gradient that was gone when the optimizer came to use it."""
    left = seen.gradients.get(key)
    return seen.delivered.get(key, False) and (left is None or not left.any())


def _breaks_of(seen: FirstStep, named: Mapping[str, Tensor]) -> list[Break]:
    """Operations whose backward took a fine gradient and passed on none, zeros, or NaN and Inf."""
    nodes = list(seen.passed)
    sites: dict[Any, Site] = {}
    for node in nodes:
        sites[node] = node.metadata.get(SITE) or sites.get(node, NOWHERE)
        for child, _ in node.next_functions:
            # what a function of torch is made of was called where the function was
            sites.setdefault(child, sites[node])
    reached = backtrace._reached(nodes, named)
    found = []
    for node, (came, went) in seen.passed.items():
        for (child, _), status in zip(node.next_functions, went, strict=False):
            behind = reached.get(child, frozenset())
            if behind and status != backtrace.FINE and backtrace._was_fine(status, came):
                is_custom = hasattr(node, "_forward_cls")
                operation = node._forward_cls.__name__ if is_custom else node.name().removesuffix("0")
                found.append(Break(status, operation, is_custom, sites[node], behind))
    return found


def _applied(seen: FirstStep, subject: Subject, gradients: Mapping[str, Tensor], erased: Mapping[str, Tensor]) -> Rung:
    """Whether the step moved what it was given a gradient for."""
    findings = []
    by_line: dict[Frame | None, list[str]] = {}
    for name, parameter in erased.items():
        if not subject.allow.name(name):
            site = seen.tracer.erasures.get(id(parameter))
            by_line.setdefault(site.user if site else None, []).append(name)
    for line, there in by_line.items():
        detail = f"the gradient of {name_some(there)} is erased between backward and the optimizer's step"
        findings.append(Finding("erased", detail, tuple(there), line))
    alive = [name for name, grad in gradients.items() if grad.any() and id(subject.named[name]) in seen.moved]
    still = [name for name in alive if not seen.moved[id(subject.named[name])] and not subject.allow.name(name)]
    # the rounding of the others: a bias that a normalisation takes out again has no more gradient than that
    norms = {name: float(gradients[name].double().norm()) for name in alive}
    still = [name for name in still if norms[name] > 1e-6 * max(norms.values())]
    back = [name for name in still if id(subject.named[name]) in seen.held_back]
    idle = [name for name in still if name not in back and seen.rates[id(subject.named[name])][0] == 0]
    coarse = [n for n in still if n not in back and n not in idle and subject.named[n].dtype in HALF]
    # its float32 master may have moved
    coarse = [name for name in coarse if name not in _masters(subject, coarse)]
    rest = [n for n in still if n not in back and n not in idle and subject.named[n].dtype not in HALF]
    for kind, names, sentence in (
        ("learning rate 0", idle, "has a gradient and a learning rate of 0"),
        ("rounded away", coarse, "takes a step too small for its 16 bits: every element rounds back to what it was"),
        ("not moved", rest, "has a gradient, and the step leaves it as it was"),
    ):
        if names:
            findings.append(Finding(kind, f"{name_some(names)} {sentence}", tuple(names)))
    if findings:
        return Rung("applied", False, name_some([f.kind for f in findings]), findings)
    if not alive:
        return Rung("applied", None, "there is no gradient to step with" if seen.stepped else "no step was taken")
    if back:
        detail = f"a scheduler holds the learning rate of {name_some(back)} at 0 for more than {seen.looks} steps"
        return Rung("applied", None, detail)
    share = sum(seen.moved[id(subject.named[n])] for n in alive) / sum(gradients[n].numel() for n in alive)
    return Rung("applied", True, f"{len(alive)} parameters moved ({share:.0%} of their elements)")


def _notes(seen: FirstStep, subject: Subject, trace: Trace, frozen: list[str]) -> list[str]:
    lines: dict[tuple[str, Frame], int] = {}
    for event in trace.reaching:
        partly = event.lost & seen.alive
        if partly and not event.carried and not subject.allow.event(event):
            key = (event.operation, event.site.user)
            lines[key] = lines.get(key, 0) | partly
    notes = []
    for (operation, frame), lost in lines.items():
        names = name_some(trace.labels.names_of(lost), 2)
        notes.append(f"one way to the loss is cut, another is not: {operation} at {frame} ({names})")
    skipped = [name for name, p in subject.named.items() if id(p) in seen.later and id(p) not in seen.gradients]
    if skipped:
        notes.append(f"{name_some(skipped)} is skipped by the first step, and reached by a later one")
    if frozen:
        notes.append(f"the optimizer holds {len(frozen)} frozen parameters: {name_some(frozen)}")
    held = seen.trainable(seen.stepped)
    again = [site for key, site in seen.tracer.erasures.items() if key in held and not _is_erased(seen, key)]
    again = [site for site in again if seen.losses > 1]
    if again and any(seen.delivered.values()):
        notes.append(f"gradients were taken away between the step's {seen.losses} backward passes, at {again[0].user}")
    others = len(seen.optimizers) - len(seen.stepped)
    if seen.stepped and others > 0:
        notes.append(f"{others} of {len(seen.optimizers)} optimizers had not stepped: what they hold is not judged")
    notes += [f"allow entry {entry!r} matched nothing" for entry, count in subject.allow.matches.items() if not count]
    return notes
