"""What a measured derivative showed beside autograd's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """How far the measured derivative is from autograd's at one pair of steps, relative to the gradient's scale."""

    step: float
    deviation: float
    error: float


@dataclass
class Verdict:
    """What one direction showed.

    Args:
        ok: agreement, or None where it could not be judged.
        deviation: measured minus autograd's derivative, relative to the root of the summed squares of all shares.
        resolution: the smallest relative deviation that would have been seen.
        ratio: measured over autograd's derivative.
        shares: parameter name -> its part of autograd's derivative, relative to the same scale.
        reason: why it was not judged, or how it was.
    """

    ok: bool | None
    deviation: float
    resolution: float
    ratio: float
    shares: dict[str, float] = field(default_factory=dict)
    reason: str = ""
