"""A gradient of which a part is taken away on purpose before the optimizer uses it: a projection.

Masks of pruned weights, gradient centralisation, and gradients that are kept off an old task's space leave P g of a
gradient g. Whatever P keeps, |P g|^2 = <P g, g>: so it is told from a gradient that was replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwen_fused.proof.changing_line import changing_line
from qwen_fused.proof.enlarged import APART, SAME_DIRECTION, Change
from qwen_fused.proof.ladder import name_some
from qwen_fused.proof.subject import Subject


def is_projected(change: Change, others: Iterable[Change]) -> bool:
    """Whether a part of a gradient was taken away, and what is left at most clipped as the others are."""
    straight = [other.factor for other in others if other.cosine >= SAME_DIRECTION]
    clip = min(1.0, min(straight, default=1.0))
    return any(abs(change.kept - factor) <= APART * factor for factor in (1.0, clip))


def note_projected(subject: Subject, projected: Mapping[str, float]) -> None:
    """Tell whose gradients were projected, where, and what was left."""
    names = [name for name in projected if not subject.allow.name(name)]
    if not names:
        return
    most = min(names, key=lambda name: projected[name])
    parameter = subject.named[most]
    frame = changing_line(subject, parameter, lambda before, after: after < (1 - APART) * before, during_step=True)
    place = f" at {frame}" if frame else ""
    subject.note(
        f"a part of the gradient of {name_some(names)} is taken away before the step{place}, by a mask or another "
        f"projection: {projected[most]:.0%} of its length is left"
    )
