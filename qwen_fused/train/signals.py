"""Signals that ask a run to end: it finishes its batch, writes a checkpoint, and ends with the signal's own code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, what schedulers and `kill` send, and a terminal that goes away
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A run ended because a signal asked for it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """Keep the first such signal for the loop to ask for between batches (None: there was none); a second acts at once.

    What nohup or a parent has set to be ignored stays ignored. Outside the main thread the caller's handling stays.
    """
    seen: int | None = None

    def handler(number: int, frame: Any) -> None:
        nonlocal seen
        if seen is not None:
            raise Interrupted(number)
        seen = number

    before = {}
    try:
        for number in END_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:
        # not the main thread
        pass
    try:
        yield lambda: seen
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
