"""The fourth rung: autograd's derivative is the loss's own along random directions; if not, whose backward is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_fused.common.layers import group_by_layer
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.failed_backward import reason_of
from qwen_fused.proof.kinds import WRITTEN
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.replay import Held, ReplayMismatch
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Gradients, Subject, as_float
from qwen_fused.proof.trusted_ops import Point
from qwen_fused.proof.upcast import real_type
from qwen_fused.proof.verdict import Verdict
from qwen_fused.proof.wrong_backward import find_wrong_backward

# what float64 shows, slight and unexplained, must show in the model's own precision too
DOUBT, SLIGHT = "in float64", 0.05


def correct(
    subject: Subject,
    point: Point,
    directions: int,
    seed: int,
    base: Mapping[str, Tensor] | None = None,
    memory: int | None = None,
    repeats: bool = False,
) -> Rung:
    """Judge the gradients taken at a point, where the parameters are, along random directions.

    Args:
        subject: what is proved.
        point: the call that the gradients are of.
        directions: how many.
        seed: for the directions.
        base: name -> value of the parameter there; a copy of them is made when None.
        memory: bytes that this rung may take beyond the gradients and `base`; as many as it needs when None.
        repeats: whether the loss function was seen to return the same loss, bit for bit, at another point.
    """
    trace, gradients, loss = point.trace, point.gradients, point.loss
    if gradients.error is not None:
        # the first call's backward went through, or nothing would have been moved: a second call's does not
        reason = f"the backward of a second call raised: {reason_of(gradients.error)}"
        findings = [] if trace.stale or not gradients.of else [Finding("backward failed", reason, tuple(gradients.of))]
        return Rung("correct", False if findings else None, reason, findings)
    if trace.exchanges:
        # each process judges by itself how often it must look: they would wait for each other for ever
        return Rung("correct", None, "the loss is computed by several processes together, which is not measured")
    if not gradients.of or not isinstance(loss, Tensor):
        return Rung("correct", None, "there is no gradient to judge")
    held: dict[Slot, Held] = {**trace.held(carried=subject.own_backward), **point.linearized}
    value = as_float(loss)
    try:
        # with nothing held still it is the call that was seen to repeat itself
        again = value if repeats and not held else subject.value(held, None, trace.draws)
    except ReplayMismatch as error:
        return Rung("correct", None, f"the loss function does not make the same calls twice: {error}")
    nondeterminism = abs(again - value)
    if not nondeterminism <= 1e-2 * abs(value) + 1e-12:
        detail = f"the loss is {value:.6g}, then {again:.6g} with the same parameters and random state: not repeatable"
        return Rung("correct", None, "the loss is not finite" if math.isnan(nondeterminism) else detail)
    judged = _judged(trace, gradients)
    if not judged:
        return Rung("correct", None, "every parameter is written to, or cached, by the loss function itself")
    ask = Asked(judged, directions, seed, base, memory, value, nondeterminism)
    rung = _measured(subject, point, held, ask)
    written = {event.slot: event for event in trace.reaching if event.kind in WRITTEN and event.slot in held}
    if rung.ok is False and written and gradients.erased_at is None:
        # a fixed point found without a graph, say, whose hook or whose own backward brings the gradient of the whole
        whole = _measured(subject, point, {slot: h for slot, h in held.items() if slot not in written}, ask)
        if whole.ok:
            places = name_some(dict.fromkeys(str(event.site.user) for event in written.values()), 2)
            subject.notes.append(f"a hook, or the backward that was given, brings the gradient that is cut at {places}")
            rung = whole
    left = len(gradients.of) - len(judged)
    rung.detail += f"; {left} not judged: the loss function writes to them or caches them" if left else ""
    return rung


@dataclass(frozen=True)
class Asked:
    """What is measured, and how: the arguments of `correct`, the loss, and by how much it differs from itself."""

    judged: dict[str, Tensor]
    directions: int
    seed: int
    base: Mapping[str, Tensor] | None
    memory: int | None
    value: float
    nondeterminism: float


def _measured(subject: Subject, point: Point, held: Mapping[Slot, Held], ask: Asked) -> Rung:
    """Compare with finite differences of the loss while the given calls' results are held still."""
    trace = point.trace
    coarse = _coarsest(subject, trace, point.loss)
    groups, types, planned = _plan(ask.judged, _types(coarse, trace.threads), ask.memory)
    rung, doubt, reason = Rung("correct", None, ""), None, planned
    for wide in types:
        # a sum over groups of parameters, most often one of all of them
        evaluate = subject.evaluation(trace, held, wide)
        parts: list[Rung] = []
        for group in groups:
            lines = Directions(subject.trainable, group, evaluate, coarse, wide, ask.seed, ask.base)
            try:
                if wide is not None and not parts and (said := _disagreement(lines, ask.value, coarse)):
                    reason += f"; not in {str(wide).removeprefix('torch.')}: {said}"
                    break
                count = ask.directions if len(groups) == 1 else 1
                verdicts = [lines.check(n, ask.nondeterminism) for n in range(count)]
                parts.append(_summarize(subject, point, lines, verdicts, ask.nondeterminism, doubt))
            except ReplayMismatch as error:
                parts.append(Rung("correct", None, f"the loss function does not make the same calls twice: {error}"))
            finally:
                lines.restore()
        if not parts:
            continue
        # the worst of them: a fault, else what can't be told
        rung = min(parts, key=lambda part: {False: 0, None: 1, True: 2}[part.ok])
        if rung.ok is not None:
            break
        doubt = rung.detail if rung.detail.startswith(DOUBT) else None
    rung.detail += reason
    return rung


def _plan(
    judged: dict[str, Tensor], types: list[torch.dtype | None], memory: int | None
) -> tuple[list[dict[str, Tensor]], list[torch.dtype | None], str]:
    """Which parameters are moved together, in which types, and what to say of it, so that it fits into the memory."""
    sizes = {name: gradient.numel() for name, gradient in judged.items()}
    # a direction in float32, and the largest parameter in float64 twice while it is used
    widest = 16 * max(sizes.values())
    if memory is None or 4 * sum(sizes.values()) + widest <= memory:
        return [judged], types, ""
    groups = [{name: judged[name] for name in names} for names in group_by_layer(judged, most=len(judged)).values()]
    said = f"; layer by layer, {len(groups)} of them"
    if max(4 * sum(sizes[name] for name in group) for group in groups) + widest <= memory:
        return groups, types, f"{said}, to stay within {memory / 1e6:.0f} MB"
    return groups, [None], f"{said}, in the model's own precision, to stay within {memory / 1e6:.0f} MB"


def _judged(trace: Trace, gradients: Gradients) -> dict[str, Tensor]:
    """Gradients of what the loss is a function of: not of what it writes to itself, or keeps from an earlier call."""
    label = trace.rewritten
    if not trace.threads:
        for stale, _ in trace.stale:
            label |= stale
    left = set(trace.labels.names_of(label))
    return {name: g for name, g in gradients.before_changes().items() if name not in left}


def _coarsest(subject: Subject, trace: Trace, loss: Tensor) -> torch.dtype:
    """The coarsest type that autograd computed in."""
    if trace.half:
        return torch.bfloat16
    types = {real_type(p.dtype) for p in subject.trainable.values()} | {loss.dtype}
    return min(types, key=lambda t: torch.finfo(t).bits)


def _types(coarse: torch.dtype, threads: bool) -> list[torch.dtype | None]:
    """Types to evaluate in, the best first; None is the model's own."""
    if coarse == torch.float64 or threads:
        # what other threads compute is not seen, and can't be had in another type
        return [None]
    return [torch.float64, *((torch.float32,) if coarse != torch.float32 else ()), None]


def _disagreement(lines: Directions, value: float, coarse: torch.dtype) -> str:
    """Why the loss can't be computed in the wider type, or is another there; empty where it is the same loss."""
    allowed = {torch.float32: 3e-5}.get(coarse, 5e-2)
    try:
        # the loss bends on the way, so that only agreement is told by the mean
        if abs(lines.between(value) - value) <= allowed * abs(value) + 1e-6:
            return ""
        here = lines.here(exactly=True)
    except ReplayMismatch:
        return "it does not make the same calls there"
    except Exception as error:
        # some code insists on its own type, and says so in its own way; the model's own precision is still to come
        return str(error).strip().partition("\n")[0]
    return "" if abs(here - value) <= allowed * abs(value) + 1e-6 else f"the loss is {here:.6g} there, not {value:.6g}"


def _summarize(
    subject: Subject, point: Point, lines: Directions, verdicts: list[Verdict], nondeterminism: float, doubt: str | None
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
        findings = find_wrong_backward(subject, point, lines, verdicts)
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
