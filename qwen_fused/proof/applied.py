"""The fifth rung: the step moves the parameters that the loss is computed from, and the loss follows."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qwen_fused.proof.changing_line import changing_line, undoing_line
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.erased import erased
from qwen_fused.proof.frames import NOWHERE, Frame
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.projected import note_projected
from qwen_fused.proof.reducers import processes
from qwen_fused.proof.step import HALF_PRECISION, SAME_FACTOR, Step
from qwen_fused.proof.subject import Gradients, Subject

# norm of the gradient that the optimizer uses over that of the one backward left: more than this is no rounding
LARGEST_RATIO = 1.01


def applied(subject: Subject, step: Step | None, gradients: Gradients, first: Trace, later: Trace | None) -> Rung:
    """Judge the step, and the parameters that later calls of the loss function used.

    Args:
        subject: what is proved.
        step: of the first call's gradients; None when there was none to take.
        gradients: of the first call.
        first: the first call.
        later: a later call, with the parameters moved a little.
    """
    findings = _check_persistence(first, later)
    # what a hook takes away and the step brings back is there when it is used
    gone = tuple(n for n in gradients.erased if step is None or not step.stepped or n in step.missing)
    if gone:
        findings.append(erased(subject, gone, during_step=False))
    if not subject.optimizers:
        if findings:
            return Rung("applied", False, name_some([f.kind for f in findings]), findings)
        return Rung("applied", None, "no optimizer was given", asked=False)
    if step is None:
        ok = False if findings else None
        return Rung("applied", ok, "there is no gradient to step with", findings)
    findings += _check_update(subject, step, gradients)
    if not findings:
        findings += _check_descent(step, gradients)
    if findings:
        return Rung("applied", False, name_some([f.kind for f in findings]), findings)
    if step.warming_up:
        names = name_some(step.warming_up)
        subject.notes.append(
            f"a warm-up holds the learning rate of {names} at 0: the step is judged at the rate to come"
        )
    return Rung("applied", True, _told(step, gradients))


def _told(step: Step, gradients: Gradients) -> str:
    """What the step did, in one line."""
    detail = f"{len(gradients.of)} parameters moved ({step.moved:.0%} of their elements)"
    if step.in_backward:
        detail += " while backward was going on"
    if step.master_only:
        detail += f", {len(step.master_only)} of them so far in the optimizer's float32 masters only"
    change = step.first_order
    detail += f"; the loss changes by {change.actual:+.2e}"
    if change.part == 1:
        return f"{detail}, first order says {change.part_predicted:+.2e}"
    if change.part:
        small = f"1/{1 / change.part:.0f} of the step"
        return f"{detail}, and over {small} by {change.part_actual:+.2e}, first order says {change.part_predicted:+.2e}"
    return f"{detail}; first order not judged: {change.reason}" if change.reason else detail


def _check_descent(step: Step, gradients: Gradients) -> list[Finding]:
    """A step that is not down the gradient of this loss."""
    names, change = tuple(gradients.of), step.first_order
    if (
        not (step.had_state or step.noisy or gradients.noisy or gradients.allowed)
        # many processes step down the mean of their gradients, which may be up for one of them
        and processes() == 1
        and change.predicted > 0
        and change.actual > 20 * change.nondeterminism
        and change.part != 0.0
    ):
        detail = f"the step goes uphill: the loss rises by {change.actual:.2g}, as its gradient predicts"
        turned = [
            Finding("uphill", f"{detail}; a hook on {name_some(whose)} turns its gradient round", whose, frame)
            for frame, whose in gradients.turned
        ]
        return turned or [Finding("uphill", detail, names)]
    if change.part == 0.0:
        ratio = change.part_actual / change.part_predicted
        detail = f"a small part of the step changes the loss by {ratio:.2g} times what its gradient predicts"
        return [Finding("first order", detail, names)]
    return []


def _check_persistence(first: Trace, later: Trace | None) -> list[Finding]:
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
        if trace is not None and trace.stale and not trace.threads:
            label, site = trace.stale[0]
            names = trace.labels.names_of(label)
            detail = f"{name_some(names)} is used through a tensor of an earlier call, which no longer follows it"
            findings.append(Finding("stale cache", detail, names, site.user, site.inside))
            break
    else:
        findings += _cached_values(first, later)
    return findings


def _cached_values(first: Trace, later: Trace | None) -> list[Finding]:
    """Parameters that the first call's loss depended on and a later call's doesn't: their values are cached."""
    if later is None or not all(isinstance(t.loss, Tensor) and not t.threads for t in (first, later)):
        return []
    labels = first.labels
    gone = first.depends_on & ~later.depends_on & labels.trainable
    if not gone:
        return []
    names = labels.names_of(gone)
    detail = f"the first call's loss depends on {name_some(names)}, the next call's does not: something was kept"
    site = next((site for label, site in later.kept if label & gone), NOWHERE)
    return [Finding("stale cache", detail, names, None if site is NOWHERE else site.user, site.inside)]


def _check_update(subject: Subject, step: Step, gradients: Gradients) -> list[Finding]:
    """Whether the optimizer stepped, by the gradients that backward left, and moved every parameter."""
    if not step.stepped:
        names = tuple(gradients.of)
        detail = "no optimizer's step was called (a gradient scaler skips it after an overflow)"
        return [Finding("no step", detail, names)]
    findings = _check_used_gradients(subject, step, gradients)
    for finding in check_moved(subject, step):
        line = None
        if finding.kind == "not moved" and not step.in_backward:
            line = undoing_line(subject, subject.named[finding.parameters[0]])
        detail = f"{finding.detail}: what the optimizer did is undone" if line else finding.detail
        findings.append(dataclasses.replace(finding, detail=detail, frame=line))
    return findings


def _check_used_gradients(subject: Subject, step: Step, gradients: Gradients) -> list[Finding]:
    """The gradients that the optimizer used are those that backward left, with the loss's scale taken off."""
    findings = []
    lost = tuple(name for name in step.missing if name not in gradients.erased and not subject.allow.name(name))
    if lost:
        findings.append(erased(subject, lost, during_step=True))
    changed = tuple(name for name in dict.fromkeys(step.changed) if not subject.allow.name(name))
    if step.projected:
        note_projected(subject, step.projected)
    if changed and step.noisy:
        subject.note("noise is added to the gradient between backward and the optimizer's step")
    elif changed:
        detail = f"the gradient of {name_some(changed)} that the optimizer uses is not the one that backward left"
        findings.append(Finding("changed", detail, changed))
    if gradients.scale > 1 and step.norm_ratio > LARGEST_RATIO:
        detail = f"the loss is scaled by {gradients.scale:g} for backward, and the gradient that the optimizer uses is "
        detail += f"still {step.norm_ratio:.3g} times the loss's own: unscale it before it is clipped and used"
        findings.append(Finding("still scaled", detail, tuple(step.enlarged or gradients.of)))
    elif _is_clipped_first(step.factors, gradients.scale):
        detail = f"the gradient is clipped while it is still scaled by {gradients.scale:g}: what the optimizer uses is "
        detail += f"{step.norm_ratio:.2g} of the loss's own; unscale it before it is clipped"
        findings.append(Finding("clipped before unscaling", detail, tuple(gradients.of)))
    elif _is_unscaled_twice(step.factors, gradients.scale):
        names = tuple(gradients.of)
        detail = f"the loss's scale, {gradients.scale:g}, is taken off the gradient twice: what the optimizer uses is "
        detail += f"{step.norm_ratio:.2g} of the loss's own"
        findings.append(Finding("unscaled twice", detail, names, _second_time(subject, names, gradients.scale)))
    return findings


def _is_unscaled_twice(factors: list[float], scale: float) -> bool:
    """Whether the loss's scale was taken off once more when it was off."""
    if scale <= 1 + SAME_FACTOR:
        return False
    off = [factor for factor in factors if abs(factor * scale - 1) < SAME_FACTOR]
    return len(off) > 1 or any(abs(factor * scale**2 - 1) < SAME_FACTOR for factor in factors)


def _is_clipped_first(factors: list[float], scale: float) -> bool:
    """Whether the gradient was made smaller by something before the loss's scale was taken off."""
    unscaled = next((i for i, factor in enumerate(factors) if abs(factor * scale - 1) < SAME_FACTOR), None)
    return scale > 1 and unscaled is not None and any(factor < 1 - SAME_FACTOR for factor in factors[:unscaled])


def _second_time(subject: Subject, names: tuple[str, ...], scale: float) -> Frame | None:
    """The line that takes the scale off once more."""
    times = 0

    def is_second(before: float, after: float) -> bool:
        nonlocal times
        times += before > 0 and abs(after / before * scale - 1) < SAME_FACTOR
        return times == 2

    return changing_line(subject, subject.named[names[0]], is_second, during_step=True)


def check_moved(subject: Subject, step: Step) -> list[Finding]:
    """Every parameter that has a gradient and is in a group moved; if not, why."""
    unmoved = [n for n in step.unmoved if n not in step.missing and n in step.rates and not subject.allow.name(n)]
    zero_rate = tuple(name for name in unmoved if step.rates[name] == 0)
    findings = []
    if zero_rate:
        detail = f"{name_some(zero_rate)} has a gradient and a learning rate of 0"
        findings.append(Finding("learning rate 0", detail, zero_rate))
    rounded = tuple(n for n in unmoved if n not in zero_rate and subject.named[n].dtype in HALF_PRECISION)
    if rounded:
        kind = str(subject.named[rounded[0]].dtype).removeprefix("torch.")
        detail = f"the step of {name_some(rounded)} is too small for {kind}: every element rounds back to what it was"
        findings.append(Finding("rounded away", detail, rounded))
    rest = tuple(n for n in unmoved if n not in zero_rate and n not in rounded)
    if rest:
        detail = f"{name_some(rest)} has a gradient, and the step leaves it as it was"
        findings.append(Finding("not moved", detail, rest))
    return findings
