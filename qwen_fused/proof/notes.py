"""What is no fault and worth knowing: partial cuts, values that come back from outside, a scale, idle allowances."""

from __future__ import annotations

import math

import torch

from qwen_fused.proof.cuts import PartialCut, Trace
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.ladder import name_some
from qwen_fused.proof.partial_cuts import Weighed, partial_cuts
from qwen_fused.proof.subject import Gradients, Subject


def notes_of(subject: Subject, trace: Trace, gradients: Gradients, weighed: Weighed) -> list[str]:
    """Cuts beside a way that does connect, with what they were found to take, and allowances that nothing needed."""
    taken = {(cut.operation, cut.frame): _taken(cut) for cut in weighed.cuts}
    labels = trace.labels
    lines: dict[tuple[str, Frame], int] = {}
    for event in partial_cuts(subject, trace, count=True):
        key = (event.operation, event.site.user)
        lines[key] = lines.get(key, 0) | event.lost & trace.alive
    notes = [*subject.notes]
    notes += [
        f"one way to the loss is cut, another is not: {operation} at {frame} ({name_some(labels.names_of(label), 2)})"
        + taken.get((operation, frame), "")
        for (operation, frame), label in lines.items()
    ]
    notes += [
        f"a value that left tensors comes back into the loss: {event.operation} at {event.site.user}"
        + taken.get((event.operation, event.site.user), "")
        for event in weighed.returned
    ]
    if trace.threads:
        notes.append("parts of the loss are computed by other threads, which are not followed")
    carried = [event for event in trace.reaching if event.carried]
    if carried and subject.own_backward:
        where = f"{carried[0].operation} at {carried[0].site.user}"
        notes.append(f"the gradient is carried past {where} by the backward that was given")
    if gradients.scale != 1 and not trace.half:
        why = ", though nothing is computed in 16 bits: is autocast on, and for this device?"
        notes.append(f"the loss is scaled by {gradients.scale:g} for backward{why if gradients.scale > 1 else ''}")
    if not torch.is_grad_enabled():
        notes.append("gradients were switched off where prove was called")
    notes += [f"allow entry {entry!r} matched nothing" for entry, count in subject.allow.matches.items() if not count]
    return notes


def _taken(cut: PartialCut) -> str:
    if cut.unknown:
        return f"; what it takes of the gradient can't be measured: {cut.unknown}"
    return "" if math.isnan(cut.share) else f"; it takes {cut.share:.0%} of the gradient"
