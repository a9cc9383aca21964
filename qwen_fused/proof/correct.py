"""The fourth rung: autograd's derivative is the loss's own along random directions; if not, whose backward is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.derivative import Directions, Verdict
from qwen_fused.proof.frames import of_function
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.replay import Held, ReplayMismatch, Slot, Upcast
from qwen_fused.proof.subject import Gradients, Subject, as_float
from qwen_fused.proof.trusted_ops import LinearizedOp, wrong_ops

# what float64 shows, slight and unexplained, must show in the model's own precision too
DOUBT, SLIGHT = "in float64", 0.05
# parts of a model that are moved one by one to find the wrong ones
SEARCHED = 24
# parameters beyond which a second copy in float64 is too much to ask
MOST_IN_FLOAT64 = 500_000_000


def correct(
    subject: Subject,
    trace: Trace,
    gradients: Gradients,
    loss: Any,
    linearized: Mapping[Slot, LinearizedOp],
    directions: int,
    seed: int,
) -> Rung:
    """Judge the gradients taken at the present point along random directions.

    Args:
        subject: what is proved, its parameters where the gradients were taken.
        trace: the call that the gradients are of.
        gradients: of that call.
        loss: of that call.
        linearized: custom operations to take at their word.
        directions: how many.
        seed: for the directions.
    """
    if not gradients.of or not isinstance(loss, Tensor):
        return Rung("correct", None, "there is no gradient to judge")
    held: dict[Slot, Held] = {**trace.held(carried=subject.own_backward), **linearized}
    for linearized_op in linearized.values():
        linearized_op.finish()
    value = as_float(loss)
    try:
        again = subject.value(held)
    except ReplayMismatch as error:
        return Rung("correct", None, f"the loss function does not make the same calls twice: {error}")
    nondeterminism = abs(again - value)
    if not nondeterminism <= 1e-2 * abs(value) + 1e-12:
        detail = f"the loss is {value:.6g}, then {again:.6g} with the same parameters and random state: not repeatable"
        return Rung("correct", None, "the loss is not finite" if math.isnan(nondeterminism) else detail)
    stale = {name for label, _ in trace.stale for name in trace.labels.names_of(label)}
    judged = {name: g for name, g in gradients.of.items() if name not in stale}
    types = {p.dtype for p in subject.trainable.values()} | {loss.dtype}
    coarse = torch.bfloat16 if trace.half else min(types, key=lambda t: torch.finfo(t).bits)
    rung, doubt = Rung("correct", None, ""), None
    for wide in _types(subject, coarse):
        lines = Directions(subject.trainable, judged, _evaluation(subject, held, wide), coarse, wide, seed)
        try:
            if wide is not None and not _agrees(lines, value, coarse):
                continue
            verdicts = [lines.check(n, nondeterminism) for n in range(directions)]
            rung = _summarize(subject, trace, lines, verdicts, nondeterminism, doubt)
        except ReplayMismatch as error:
            rung.detail = f"the loss function does not make the same calls twice: {error}"
        finally:
            lines.restore()
        if rung.ok is not None:
            break
        doubt = rung.detail if rung.detail.startswith(DOUBT) else None
    return rung


def _types(subject: Subject, coarse: torch.dtype) -> list[torch.dtype | None]:
    """Types to evaluate in, the best first; None is the model's own."""
    if coarse == torch.float64:
        return [None]
    room = sum(p.numel() for p in subject.snapshot.parameters) <= MOST_IN_FLOAT64
    return [*((torch.float64,) if room else ()), *((torch.float32,) if coarse != torch.float32 else ()), None]


def _evaluation(
    subject: Subject, held: Mapping[Slot, Held], wide: torch.dtype | None
) -> Callable[[Mapping[int, Tensor] | None], float]:
    return lambda values: subject.value(held, None if wide is None else Upcast(wide, values or {}))


def _agrees(lines: Directions, value: float, coarse: torch.dtype) -> bool:
    """Whether the loss can be computed in the wider type, and is the same loss: other draws would give another."""
    allowed = {torch.float32: 3e-5}.get(coarse, 5e-2)
    try:
        return abs(lines.here() - value) <= allowed * abs(value) + 1e-6
    except Exception:
        # some code insists on its own type, and says so in its own way; the model's own precision is still to come
        return False


def _summarize(
    subject: Subject, trace: Trace, lines: Directions, verdicts: list[Verdict], nondeterminism: float, doubt: str | None
) -> Rung:
    judged = lines.gradients
    if all(verdict.ok for verdict in verdicts):
        # what weighs too little beside the others is moved alone
        small = [n for n in judged if all(abs(v.shares.get(n, 0.0)) < v.resolution for v in verdicts)]
        if small and len(small) < len(judged) and lines.wide is None:
            alone = lines.check(0, nondeterminism, only=small)
            verdicts += [alone] if alone.ok is not None else []
    if any(verdict.ok is False for verdict in verdicts):
        failed = [v for v in verdicts if v.ok is False]
        findings = _find_wrong_backward(subject, trace, lines, judged, verdicts)
        detail = f"the loss's own derivative is {failed[0].ratio:.3g} times autograd's"
        slight = all(abs(v.deviation) < SLIGHT for v in failed)
        if lines.wide and slight and all(finding.frame is None for finding in findings):
            return Rung("correct", None, f"{DOUBT} {detail}, which the model's own precision can't tell from agreement")
        return Rung("correct", False, detail, findings)
    if doubt is not None:
        return Rung("correct", None, doubt)
    unsure = [verdict.reason for verdict in verdicts if verdict.ok is None]
    if unsure:
        return Rung("correct", None, unsure[0])
    deviation = max(abs(verdict.deviation) for verdict in verdicts)
    resolution = max(verdict.resolution for verdict in verdicts)
    where = "float64" if lines.wide else "the model's own precision"
    detail = f"{len(verdicts)} directions agree with finite differences in {where} to {deviation:.0e}"
    detail += f" (resolved {resolution:.0e})"
    # a share below the resolution could be wrong by its whole size unseen
    small = [name for name in judged if all(abs(v.shares.get(name, 0.0)) < v.resolution for v in verdicts)]
    detail += f"; {len(small)} of {len(judged)} parameters too small to tell" if small else ""
    return Rung("correct", True, detail)


def _find_wrong_backward(
    subject: Subject, trace: Trace, lines: Directions, judged: Mapping[str, Tensor], verdicts: list[Verdict]
) -> list[Finding]:
    """Name the custom operation whose backward disagrees with its forward; else a hook; else the layers concerned."""
    findings = []
    for op, said in wrong_ops(subject):
        names = tuple(n for n in trace.labels.names_of(op.inputs) if n in judged)
        findings.append(Finding("wrong", f"the backward of {op.name} is {said}", names, op.site.user, op.site.inside))
    if findings:
        return findings
    lines.restore()
    ratios = [verdict.ratio for verdict in verdicts if verdict.ok is False]
    uniform = len(ratios) > 1 and all(abs(ratio / ratios[0] - 1) < 0.02 for ratio in ratios)
    names = tuple(judged) if uniform else tuple(_narrowed(lines, list(judged)))
    for name in names:
        for hook in _hooks_of(subject.named[name]):
            return [Finding("wrong", f"a hook on {name} changes its gradient", names, of_function(hook))]
    detail = f"the loss's own derivative disagrees for {name_some(names)}"
    if trace.hooks:
        site = trace.hooks[0]
        return [Finding("wrong", f"{detail}; a hook registered here changes a gradient", names, site.user, site.inside)]
    for event in trace.cuts:
        if event.aliased and event.lost:
            detail += "; a value that backward may need is written to through this, behind autograd's back"
            return [Finding("wrong", detail, names, event.site.user, event.site.inside)]
    if uniform:
        detail = f"every gradient is {1 / ratios[0]:.3g} times the loss's derivative: is it scaled before backward?"
    else:
        detail += "; no custom operation or hook was found to blame"
    return [Finding("wrong", detail, names)]


def _narrowed(lines: Directions, names: list[str]) -> list[str]:
    """The wrong ones among parameters, part by part of the model, as far down as some of a part's parts are right."""
    parts: dict[str, list[str]] = {}
    split = [name.split(".") for name in names]
    depth = next((d for d in range(min(map(len, split))) if len({s[d] for s in split}) > 1), None)
    for name, pieces in zip(names, split, strict=True):
        parts.setdefault(name if depth is None else pieces[depth], []).append(name)
    if not 1 < len(parts) <= SEARCHED:
        return names
    wrong = lines.wrong_among(parts)
    if not wrong or len(wrong) == len(parts):
        return names
    return [name for part in wrong for name in _narrowed(lines, parts[part])]


def _hooks_of(parameter: Tensor) -> list[Callable[..., Any]]:
    """Hooks that may change a parameter's gradient."""
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]
