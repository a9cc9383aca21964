"""The ladder of a script's first step: the rungs that can be judged from having seen it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof.allowance import Allowance
from qwen_fused.proof.applied import check_moved
from qwen_fused.proof.backtrace import ZERO, Break, breaks_among, follow_backward
from qwen_fused.proof.connected import connected
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.declared import declared
from qwen_fused.proof.frames import NOWHERE, Frame, Site
from qwen_fused.proof.gradients import Gradients
from qwen_fused.proof.kept_state import kept_random
from qwen_fused.proof.ladder import Finding, ProofReport, Rung, name_some
from qwen_fused.proof.moves import has_nonzero
from qwen_fused.proof.nonzero import layers, nonzero
from qwen_fused.proof.notes import notes_of
from qwen_fused.proof.partial_cuts import Weighed, unweighed
from qwen_fused.proof.script_names import name_parameters
from qwen_fused.proof.script_trace import SITE, joint_loss
from qwen_fused.proof.script_watch import FirstStep
from qwen_fused.proof.step import Step, masters_of, measure_movement
from qwen_fused.proof.subject import Subject

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
        loss: float,
    ):
        self.named = named
        self.modules = modules
        self.optimizers = optimizers
        self.allow = Allowance(allow)
        self.own_backward = False
        self.snapshot: Any = _Untouched()
        self.backward = lambda loss: None
        self.evaluations = 0
        self.notes = []
        self._breaks = breaks
        self._loss = loss

    def loss_fn(self) -> float:
        """Whatever is drawn, moved or held: a script is run once, and its loss is what it was."""
        return self._loss

    def call(self, *held: Any, **more: Any) -> float:
        return self._loss

    def watched_call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._breaks if function is follow_backward else None


class _Untouched:
    """Nothing was run, so nothing is left behind."""

    def clear_gradients(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def seed_generators(self, seed: int) -> None:
        pass


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
    value = 0.0 if seen.loss is None else seen.loss
    subject = _Once(named, modules, judged, allow, _breaks_of(seen, named), value)

    given = {names[key]: grad for key, grad in seen.gradients.items() if key in names}
    delivered = {name: p for name, p in named.items() if id(p) in seen.delivered or id(p) in strays or name in given}
    later = {names[key]: grad for key, grad in seen.later.items() if key in names}
    delivered |= {name: named[name] for name in later if name in named}
    gradients = {name: given[name] for name in named if name in given}
    erased = {n: p for n, p in named.items() if _is_erased(seen, id(p)) and id(p) in held}
    # a loss without a graph fails too, but that is for the cut to explain
    error = None if seen.stepped or seen.hopeless else seen.failed
    with kept_random():
        second, cut = connected(subject, trace, Gradients(of=delivered, error=error))
    left = {name: grad for name, grad in gradients.items() if name not in erased}
    ladder = [
        declared(subject),
        second,
        nonzero(subject, Gradients(of=left), later, torch.tensor(value)),
        Rung("correct", None, UNASKED, asked=False),
        _applied(seen, subject, trace, left, erased),
    ]
    weighed = unweighed(subject, trace, "a script is run once") if second.ok else Weighed()
    return ProofReport(
        rungs={rung.name: rung for rung in ladder},
        cut=cut,
        notes=_notes(seen, subject, trace, [names[key] for key in frozen], weighed),
        partial_cuts=weighed.cuts,
        allowed=dict(subject.allow.matches),
        layers=layers(gradients),
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
    return seen.delivered.get(key, False) and (left is None or not has_nonzero(left))


def _breaks_of(seen: FirstStep, named: Mapping[str, Tensor]) -> list[Break]:
    """Operations whose backward took a fine gradient and passed on none, zeros, or NaN and Inf."""
    nodes = list(seen.passed)
    sites: dict[Any, Site] = {}
    for node in nodes:
        sites[node] = node.metadata.get(SITE) or sites.get(node, NOWHERE)
        for child, _ in node.next_functions:
            # what a function of torch is made of was called where the function was
            sites.setdefault(child, sites[node])
    # a bias in there may still cancel; of a matrix that is no guess to make
    met = {id(getattr(node, "variable", None)) for node in nodes}
    hidden = frozenset(name for name, p in named.items() if id(p) not in met and p.dim() > 1)
    recomputed = Break(ZERO, "what backward runs again (a reentrant checkpoint)", False, NOWHERE, hidden)
    return [*breaks_among(seen.passed, nodes, named, sites.__getitem__), recomputed]


def _applied(
    seen: FirstStep,
    subject: Subject,
    trace: Trace,
    gradients: Mapping[str, Tensor],
    erased: Mapping[str, Tensor],
) -> Rung:
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
    alive = {name: subject.named[name] for name, grad in gradients.items() if has_nonzero(grad)}
    alive = {name: p for name, p in alive.items() if id(p) in seen.moved and id(p) in seen.before}
    step = Step(stepped=bool(seen.stepped), rates={name: seen.rates[id(p)][0] for name, p in alive.items()})
    counts = {name: seen.moved[id(p)] for name, p in alive.items()}
    measure_movement(step, counts, gradients, {name: seen.before[id(p)] for name, p in alive.items()}, trace.half)
    step.warming_up = tuple(name for name in step.unmoved if id(alive[name]) in seen.held_back)
    # a float32 master may have moved
    step.master_only = tuple(masters_of(subject, step.unmoved))
    step.unmoved = tuple(n for n in step.unmoved if n not in step.warming_up and n not in step.master_only)
    findings += check_moved(subject, step)
    if findings:
        return Rung("applied", False, name_some([f.kind for f in findings]), findings)
    if not alive:
        return Rung("applied", None, "there is no gradient to step with" if seen.stepped else "no step was taken")
    if step.warming_up:
        detail = f"a warm-up holds the learning rate of {name_some(step.warming_up)} at 0 for more than "
        return Rung("applied", None, f"{detail}{seen.looks} steps")
    return Rung("applied", True, f"{len(alive)} parameters moved ({step.moved:.0%} of their elements)")


def _notes(seen: FirstStep, subject: Subject, trace: Trace, frozen: list[str], weighed: Weighed) -> list[str]:
    notes = notes_of(subject, trace, Gradients(), weighed)
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
    return notes
