"""How long batches take, and when a run has had its minutes."""

from __future__ import annotations

import time


class Clock:
    """Seconds between batches, and whether the run's minutes are over.

    Args:
        max_minutes: that the run may have from here on; None: any number.
    """

    def __init__(self, max_minutes: float | None):
        self.started = self.last = time.monotonic()
        self.limit = 60 * max_minutes if max_minutes else float("inf")

    def lap(self) -> float:
        """Seconds since the last lap or pause."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return max(seconds, 1e-9)

    def pause(self) -> None:
        """Leave out the time since the last lap."""
        self.last = time.monotonic()

    def is_over(self) -> bool:
        """Whether the run has had its minutes."""
        return time.monotonic() - self.started > self.limit
