"""Values that leave tensors and come back into the loss as plain numbers: found by moving them a little."""

from __future__ import annotations

from typing import Any

from qwen_fused.proof.cuts import Event, Trace
from qwen_fused.proof.replay import Perturbation, ReplayMismatch
from qwen_fused.proof.subject import Subject, as_float

# departures whose value is a number that can be moved a little
NUMBERS = ("item", "tolist", "numpy")


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
            moved = as_float(subject.call({event.slot: Perturbation(0.01)}))
        except (ReplayMismatch, RuntimeError, ValueError):
            continue
        if moved != base:
            found.append(event)
    return found
