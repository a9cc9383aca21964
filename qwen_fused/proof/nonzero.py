"""The third rung: every gradient is finite and, here or a small step away, not all zero; if not, what makes it so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.layers import group_by_layer
from qwen_fused.proof import backtrace
from qwen_fused.proof.backtrace import breaks_of
from qwen_fused.proof.frames import NOWHERE, of_function
from qwen_fused.proof.hooks import hook_to_blame, hooks_of
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.moves import Noise, has_nonzero, scales_of
from qwen_fused.proof.real_parts import real_parts
from qwen_fused.proof.subject import Gradients, Subject, as_float

# operations whose backward sums the gradient up for what they add
ADDS = ("AddmmBackward", "AddBackward", "ConvolutionBackward", "SubBackward", "ExpandBackward", "SumBackward")


def nonzero(subject: Subject, gradients: Gradients, later: Mapping[str, Tensor] | None, loss: Any) -> Rung:
    """Every gradient is finite and, there or one small step away (None: its backward raised), not all zero."""
    if not gradients.of:
        return Rung("nonzero", None, "there is no gradient to look at")
    nonfinite = tuple(n for n, g in gradients.of.items() if not (_is_finite(g) and _is_finite(gradients.left.get(n))))
    zero = [n for n in zeros(gradients.of) if not subject.allow.name(n)]
    zero = [n for n in zero if gradients.of[n].numel()]
    always_zero = tuple(n for n in zero if later is not None and (n not in later or not has_nonzero(later[n])))
    findings = []
    cancels = cancelling(subject, always_zero) if always_zero else ()
    always_zero = tuple(name for name in always_zero if name not in cancels)
    if cancels and len(cancels) == len(gradients.of):
        detail = "the loss depends on no parameter: every gradient cancels to zero"
        findings.append(Finding("zero", detail, cancels))
    elif cancels:
        subject.notes.append(f"the loss does not depend on {name_some(cancels)}: its gradient cancels to zero")
    if nonfinite:
        findings += _nonfinite_by_hook(subject, gradients, nonfinite)
        rest = tuple(name for name in nonfinite if all(name not in finding.parameters for finding in findings))
        findings += _explain_nonfinite(subject, rest, loss) if rest else []
    if always_zero:
        findings += _explain_zeros(subject, always_zero)
    if findings:
        flat = len(always_zero) or len(cancels)
        detail = f"{len(nonfinite)} not finite, {flat} zero of {len(gradients.of)} gradients"
        return Rung("nonzero", False, detail, findings)
    if zero and later is None:
        return Rung("nonzero", None, f"{name_some(zero)} is zero now, and the backward of a second call raised")
    zero_here_only = [n for n in zero if n not in always_zero and n not in cancels]
    detail = f"{len(gradients.of)} gradients, all finite"
    detail += (
        f"; {len(zero_here_only)} zero now but not one step on ({name_some(zero_here_only, 1)})"
        if zero_here_only
        else ", none zero"
    )
    return Rung("nonzero", True, detail)


def zeros(gradients: Mapping[str, Tensor]) -> list[str]:
    """Names of the gradients whose every element is zero."""
    if not gradients:
        return []
    return [name for name, gradient in gradients.items() if not has_nonzero(gradient)]


def layers(gradients: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Per layer: parameters, gradient norm, largest element, and tensors that are zero or not finite."""
    rows = []
    for layer, names in group_by_layer(gradients).items():
        largest = [_largest(gradients[name]) for name in names]
        norms = [_norm(gradients[name]) for name in names]
        rows.append(
            {
                "layer": layer,
                "parameters": len(names),
                "norm": sum(norm * norm for norm in norms) ** 0.5,
                "max_abs": max(largest, key=lambda size: (math.isnan(size), size)),
                "zero": len(zeros({name: gradients[name] for name in names})),
                "nonfinite": sum(not math.isfinite(size) for size in largest),
            }
        )
    return rows


def _largest(gradient: Tensor) -> float:
    """Largest size of an element; NaN where one is."""
    if not gradient.numel():
        return 0.0
    if gradient.is_complex():
        return float(torch.linalg.vector_norm(gradient, math.inf))
    # a tenth of the time that torch's largest norm takes
    least, most = torch.aminmax(gradient)
    return max(abs(float(least)), float(most)) if most == most else math.nan


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or math.isfinite(_largest(gradient))


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(real_parts(gradient).float()))


def cancelling(subject: Subject, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the parameters that fine gradients arrive at and cancel, as a bias's do that every score has alike.

    No operation on the way gives zeros, or one that adds the parameter to something and so sums what it is given.
    """
    broken, rest = breaks_of(subject, names, backtrace.ZERO)
    added = tuple(n for brk, hit in broken if brk.operation in ADDS for n in hit)
    found = [n for n in names if n in rest or (n in added and subject.named[n].dim() <= 1)]
    return tuple(found) if found and is_flat(subject, found) else ()


def is_flat(subject: Subject, names: Sequence[str]) -> bool:
    """Whether the loss stays what it is when the parameters are moved far, together: two zeros that multiply don't."""
    before = subject.value()
    scales, noise = scales_of(subject.trainable), Noise(1)
    held = {name: subject.named[name].data.clone() for name in names}
    for name in names:
        noise.add_to(subject.named[name].data, scales[name])
    try:
        return abs(subject.value() - before) <= 1e-5 * abs(before)
    finally:
        for name, value in held.items():
            subject.named[name].data.copy_(value)


def _explain(
    subject: Subject, names: tuple[str, ...], status: str, kind: str, of_break: str, otherwise: str
) -> list[Finding]:
    """A finding for each break of one status, and one for the names that no break explains.

    Args:
        of_break: sentence with {operation} and {names}.
        otherwise: sentence with {names}.
    """
    broken, rest = breaks_of(subject, names, status)
    findings = []
    for brk, hit in broken:
        detail = of_break.format(operation=brk.operation, names=name_some(hit))
        findings.append(Finding(kind, detail, hit, brk.site.user, brk.site.inside))
    if rest:
        findings.append(Finding(kind, otherwise.format(names=name_some(rest)), rest))
    return findings


def _explain_zeros(subject: Subject, names: tuple[str, ...]) -> list[Finding]:
    """Which operation gives each of the parameters zeros, here and one small step on."""
    of_break = "{operation} passes only zeros on to {names}, and still does one step on"
    otherwise = "{names} is connected, with a gradient of exactly zero"
    findings = _explain(subject, names, backtrace.ZERO, "zero", of_break, otherwise)
    return [_by_hook(subject, finding) if finding.frame is None else finding for finding in findings]


def _by_hook(subject: Subject, finding: Finding) -> Finding:
    """The finding, with the hook's line where a hook gives the zeros."""

    def is_mended(found: Gradients) -> bool:
        return any(name in found.of and has_nonzero(found.of[name]) for name in finding.parameters)

    for name in finding.parameters:
        for function in hooks_of(subject.named[name]):
            detail = f"a hook on {name} leaves only zeros"
            return dataclasses.replace(finding, detail=detail, frame=of_function(function))
    hook = hook_to_blame(subject, is_mended)
    if hook is None:
        return finding
    detail = f"{hook.name}, registered here, leaves only zeros to {name_some(finding.parameters)}"
    return dataclasses.replace(finding, detail=detail, frame=hook.site.user, inside=hook.site.inside)


def _nonfinite_by_hook(subject: Subject, gradients: Gradients, names: Sequence[str]) -> list[Finding]:
    """Those whose gradient was finite before the hooks on the parameter had it."""
    findings = []
    for name in names:
        hooks = hooks_of(subject.named[name])
        before = gradients.own.get(name, gradients.of[name])
        if hooks and _is_finite(before):
            detail = f"a hook on {name} makes NaN or Inf of its gradient"
            findings.append(Finding("non-finite", detail, (name,), of_function(hooks[-1])))
    return findings


def _explain_nonfinite(subject: Subject, names: tuple[str, ...], loss: Any) -> list[Finding]:
    """Which operation first gives NaN or Inf: of the forward pass where the loss is either, else of the backward."""
    if isinstance(loss, Tensor) and not loss.isfinite():
        found = subject.watched_call(backtrace.first_nonfinite)
        operation, site = found or ("the loss", NOWHERE)
        detail = (
            f"{operation} first gave NaN or Inf; the loss is {as_float(loss)}, and {name_some(names)} got no better"
        )
        return [Finding("non-finite", detail, names, site.user if found else None, site.inside)]
    of_break = "the backward of {operation} gives NaN or Inf to {names}"
    otherwise = "the gradient of {names} has NaN or Inf"
    return _explain(subject, names, backtrace.NONFINITE, "non-finite", of_break, otherwise)
