"""What a solve says while it is under way: a line per task, solve.log, and on a terminal a bar with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# tasks from which the time left is judged
PACE = 3


class SolveLog:
    """Lines to the terminal and to solve.log.

    Args:
        folder: where solve.log goes; None writes none.
        quiet: nothing on the terminal.
    """

    def __init__(self, folder: Path | None = None, *, quiet: bool = False):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._log = open(folder / "solve.log", "a", buffering=1) if folder else None  # noqa: SIM115

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)
        if self._log is not None:
            self._log.write(text + "\n")

    def close(self) -> None:
        """Close solve.log."""
        if self._log is not None:
            with suppress(OSError):
                self._log.close()

    @contextmanager
    def progress(self, counts: Counts) -> Iterator[Any]:
        """A bar over the work; gives a function to call when the counts have changed, or with the work under way."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(counts.describe(), total=max(counts.work, 1), completed=counts.work_done)

            def advance(under_way: float = 0.0) -> None:
                bar.update(task, completed=counts.work_done + under_way, description=counts.describe())

            yield advance


class Counts:
    """Tasks done and solved so far, and the time left, by the work that each task is.

    Args:
        tasks: how many in all.
        work: of all tasks, in any unit.
    """

    def __init__(self, tasks: int, work: int):
        self.tasks, self.work = tasks, work
        self.done = self.solved = self.scored = self.failed = 0
        self.work_done = self.work_before = 0
        self.before = 0
        self.started = time.monotonic()

    def add(self, work: int, solved: bool | None, *, failed: bool = False, before: bool = False) -> None:
        """One task more.

        Args:
            work: what it was.
            solved: None where nobody knows.
            failed: it has no answer.
            before: it was done before this process began.
        """
        self.done += 1
        self.solved += bool(solved)
        self.scored += solved is not None
        self.failed += failed
        self.work_done += work
        self.work_before += work if before else 0
        self.before += before

    def seconds_left(self) -> float | None:
        """At the pace so far; None while there is hardly any."""
        if self.done - self.before < PACE:
            return None
        pace = (self.work_done - self.work_before) / (time.monotonic() - self.started)
        return (self.work - self.work_done) / max(pace, 1e-9)

    def describe(self) -> str:
        """`12 of 400 tasks, 5 of 12 solved`."""
        parts = [f"{self.done} of {self.tasks} tasks"]
        if self.scored:
            parts.append(f"{self.solved} of {self.scored} solved")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


def short_time(seconds: float) -> str:
    """`40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
