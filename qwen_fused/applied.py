"""The fifth rung: the step moves the parameters that the loss is computed from, and the loss follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_fused import frames, kinds, modes
from qwen_fused.cuts import Trace
from qwen_fused.frames import Frame
from qwen_fused.labels import tensors_in
from qwen_fused.ladder import Finding, Rung, name_some
from qwen_fused.subject import Gradients, Subject, as_float

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Step:
    """What one step did.

    Args:
        stepped: whether any optimizer's step was called.
        missing: names whose gradient was gone, or all zero, when the optimizer came to use it.
        still: names that did not move.
        moved: share of the elements that moved, among the parameters that have a gradient.
        predicted: <g, change of the parameters>, the loss's change to first order.
        actual: the loss's change.
        rates: name -> learning rate of its group.
        held_back: names whose learning rate a scheduler keeps at 0 for now.
        had_state: whether the optimizer had stepped before.
    """

    stepped: bool = False
    missing: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    moved: float = 0.0
    predicted: float = 0.0
    actual: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    held_back: tuple[str, ...] = ()
    had_state: bool = False


def take_step(subject: Subject, gradients: Gradients, loss: Any) -> Step | None:
    """Step as the caller does, with the gradients in place, look, and put parameters and optimizers back."""
    if not subject.optimizers or not gradients.of:
        return None
    step = Step(had_state=any(optimizer.state for optimizer in subject.optimizers))
    groups = [(o, group) for o in subject.optimizers for group in o.param_groups]
    rates = {id(p): (float(g["lr"]), float(g.get("initial_lr", 0.0))) for _, g in groups for p in g["params"]}
    known = {name: rates[id(subject.named[name])] for name in gradients.of if id(subject.named[name]) in rates}
    step.rates = {name: rate for name, (rate, _) in known.items()}
    step.held_back = tuple(name for name, (rate, initial) in known.items() if rate == 0 and initial > 0)
    alive = {name: g.detach().clone() for name, g in gradients.of.items() if g.any()}
    before = {name: subject.named[name].data.clone() for name in gradients.of}

    def look(*_: Any) -> None:
        step.stepped = True
        now = {name: subject.named[name].grad for name in alive}
        step.missing = tuple(name for name, grad in now.items() if grad is None or not grad.any())

    hooks = [optimizer.register_step_pre_hook(look) for optimizer in subject.optimizers]
    try:
        subject.step()
    finally:
        for hook in hooks:
            hook.remove()
    total = moved = 0
    still = []
    for name, old in before.items():
        change = subject.named[name].data - old
        count = int(change.count_nonzero())
        if name in alive:
            total, moved = total + change.numel(), moved + count
            step.predicted += float((alive[name].double() * change.double()).sum())
            if not count:
                still.append(name)
    step.still, step.moved = tuple(still), moved / max(total, 1)
    step.actual = subject.value() - as_float(loss)
    subject.snapshot.reset_values()
    subject.snapshot.reset_optimizers()
    return step


def applied(subject: Subject, step: Step | None, gradients: Gradients, first: Trace, later: Trace | None) -> Rung:
    """Judge the step, and the parameters that later calls of the loss function used.

    Args:
        subject: what is proved.
        step: of the first call's gradients; None when there was none to take.
        gradients: of the first call.
        first: the first call.
        later: a later call, with the parameters moved a little.
    """
    findings = _unlasting(first, later)
    if gradients.erased:
        findings.append(_erased(subject, gradients.erased, during_step=False))
    if not subject.optimizers:
        if findings:
            return Rung("applied", False, name_some([f.kind for f in findings]), findings)
        return Rung("applied", None, "no optimizer was given", asked=False)
    if step is None:
        ok = False if findings else None
        return Rung("applied", ok, "there is no gradient to step with", findings)
    findings += _unmoved(subject, step, gradients)
    if not findings and not step.had_state and step.predicted > 0 and step.actual > 0:
        detail = f"the step goes uphill: the loss rises by {step.actual:.2g}, as its gradient predicts"
        findings.append(Finding("uphill", detail, tuple(gradients.of)))
    if findings:
        return Rung("applied", False, name_some([f.kind for f in findings]), findings)
    if step.held_back:
        detail = f"a scheduler holds the learning rate of {name_some(step.held_back)} at 0; prove after its first step"
        return Rung("applied", None, detail)
    detail = f"{len(gradients.of)} parameters moved ({step.moved:.0%} of their elements)"
    detail += f"; the loss changed by {step.actual:+.2e}, first order says {step.predicted:+.2e}"
    return Rung("applied", True, detail)


def _unlasting(first: Trace, later: Trace | None) -> list[Finding]:
    """Parameters made anew at each call, made too late, or used through a graph of an earlier call."""
    findings = []
    again = {site.user for _, site in later.fresh} if later is not None else set()
    by_line: dict[Frame, list[Tensor]] = {}
    sites = {}
    for parameter, site in first.fresh:
        by_line.setdefault(site.user, []).append(parameter)
        sites[site.user] = site
    for line, made in by_line.items():
        # the name that the parameter had while it lasted, where a module held it
        shapes = tuple(first.named_after.get(id(p), f"<new {'x'.join(map(str, p.shape))}>") for p in made)
        if line in again:
            detail = f"{name_some(shapes)} is made anew at each call: random every time, trained never"
            findings.append(Finding("fresh", detail, shapes, line, sites[line].inside))
        else:
            detail = f"{name_some(shapes)} was made by the first call, after the optimizer and these names were"
            findings.append(Finding("created late", detail, shapes, line, sites[line].inside))
    for trace in (first, later):
        if trace is not None and trace.stale:
            label, site = trace.stale[0]
            names = trace.labels.names_of(label)
            detail = f"{name_some(names)} is used through a tensor of an earlier call, which no longer follows it"
            findings.append(Finding("stale cache", detail, names, site.user, site.inside))
            break
    else:
        findings += _forgotten(first, later)
    return findings


def _forgotten(first: Trace, later: Trace | None) -> list[Finding]:
    """Parameters that the first call's loss depended on and a later call's doesn't: their values are cached."""
    if later is None or not all(isinstance(t.loss, Tensor) for t in (first, later)):
        return []
    labels = first.labels
    gone = labels.values(first.loss) & ~later.labels.values(later.loss) & labels.trainable
    if not gone:
        return []
    names = labels.names_of(gone)
    detail = f"the first call's loss depends on {name_some(names)}, the next call's does not: something was kept"
    return [Finding("stale cache", detail, names)]


def _unmoved(subject: Subject, step: Step, gradients: Gradients) -> list[Finding]:
    if not step.stepped:
        names = tuple(gradients.of)
        detail = "no optimizer's step was called (a gradient scaler skips it after an overflow)"
        return [Finding("no step", detail, names)]
    findings = []
    lost = tuple(name for name in step.missing if name not in gradients.erased and not subject.allow.name(name))
    if lost:
        findings.append(_erased(subject, lost, during_step=True))
    left = [n for n in step.still if n not in step.missing and n in step.rates and not subject.allow.name(n)]
    left = [n for n in left if n not in step.held_back]
    idle = tuple(name for name in left if step.rates[name] == 0)
    if idle:
        findings.append(Finding("learning rate 0", f"{name_some(idle)} has a gradient and a learning rate of 0", idle))
    coarse = tuple(n for n in left if n not in idle and subject.named[n].dtype in HALF)
    if coarse:
        kind = str(subject.named[coarse[0]].dtype).removeprefix("torch.")
        detail = f"the step of {name_some(coarse)} is too small for {kind}: every element rounds back to what it was"
        findings.append(Finding("rounded away", detail, coarse))
    rest = tuple(n for n in left if n not in idle and n not in coarse)
    if rest:
        detail = f"{name_some(rest)} has a gradient, and the step leaves it as it was"
        findings.append(Finding("not moved", detail, rest))
    return findings


def _erased(subject: Subject, names: tuple[str, ...], during_step: bool) -> Finding:
    """Name the line that erased gradients, by doing backward and step once more with every call watched."""
    loss = subject.call()
    found: list[frames.Site] = []
    watched = subject.named[names[0]]

    def handler(func: Any, args: tuple, kwargs: dict) -> Any:
        held = watched.grad
        was = held is not None and bool(held.any())
        out = func(*args, **kwargs)
        concerned = kinds.name_of(func) == "grad.__set__" or any(True for _ in tensors_in((args, kwargs)))
        if was and not found and concerned and (watched.grad is None or not watched.grad.any()):
            found.append(frames.locate())
        return out

    subject.snapshot.clear_gradients()
    with modes.FunctionMode(handler):
        frames.boundary(subject.backward, loss)
        if during_step:
            subject.step()
    if during_step:
        subject.snapshot.reset_values()
        subject.snapshot.reset_optimizers()
    subject.snapshot.clear_gradients()
    when = "between backward and the optimizer's step" if during_step else "before backward was done"
    frame = found[0].user if found else None
    return Finding("erased", f"the gradient of {name_some(names)} is erased {when}", names, frame)


def second_look(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Move every parameter whose gradient is not zero by a random hundredth of its size; the others stay."""
    for place, (name, gradient) in enumerate(gradients.items()):
        if gradient.any():
            parameter = parameters[name]
            generator = torch.Generator(device=parameter.device).manual_seed(place)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.data.add_((0.02 * scales[name] * noise).to(parameter.dtype))
