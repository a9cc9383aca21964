"""A gradient that is longer than backward made it when the optimizer comes to use it, and others are not.

Clipping makes gradients shorter, unscaling and accumulation change all of them alike, noise and normalisation turn them
or give several one length: all of that is healthy. What is left is told, for its reader to say whether it is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_fused.proof.changing_line import changing_line
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.ladder import Enlarged
from qwen_fused.proof.subject import Subject

# a relative difference of factors and lengths that is no rounding, and a cosine that is no other direction
APART = 0.02
SAME_DIRECTION = 0.9999


@dataclass(frozen=True)
class Change:
    """What became of one gradient on its way to the optimizer.

    Args:
        factor: its length over that of the one which backward left.
        cosine: of the angle between the two.
        length: when the optimizer uses it, where it is not the very same.
        kept: what a mask, or another projection, has left in place is multiplied by this; 1 where nothing else was
            done to it.
    """

    factor: float = 1.0
    cosine: float = 1.0
    length: float = 0.0
    kept: float = 1.0


def longer_alone(changes: Mapping[str, Change], scale: float) -> dict[str, float]:
    """Name -> factor of those that were made longer while others were not, or not as much.

    Args:
        changes: name -> what became of the gradient.
        scale: of the loss; one that makes it smaller need not be taken off.
    """
    if not changes or any(change.cosine < SAME_DIRECTION for change in changes.values()):
        return {}
    factors = {name: change.factor / min(1.0, scale) for name, change in changes.items()}
    usual = max(1.0, min(factors.values()))
    longer = {name: factor for name, factor in factors.items() if factor > (1 + APART) * usual}
    lengths = [changes[name].length for name in longer]
    if len(lengths) > 1 and max(lengths) <= (1 + APART) * min(lengths):
        # each was given one length
        return {}
    return longer


def enlarged(subject: Subject, factors: Mapping[str, float]) -> Enlarged | None:
    """What to tell of gradients that were made longer alone, unless it is allowed."""
    names = tuple(name for name in factors if not subject.allow.name(name))
    if not names or any(subject.allow.given(given) for given in (subject.backward, subject.given_step)):
        return None
    most = max(names, key=lambda name: factors[name])
    parameter = subject.named[most]
    frame: Frame | None = changing_line(
        subject, parameter, lambda before, after: before > 0 and after > (1 + APART) * before, during_step=True
    )
    found = Enlarged(names, factors[most], frame)
    subject.note(f"{found.told}: other gradients are not")
    return found
