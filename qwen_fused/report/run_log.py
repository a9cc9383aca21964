"""What a run says: the log line, train.log, metrics.jsonl, and a progress bar on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qwen_fused.common.files import write_atomic
from qwen_fused.report.answers import Example, plain_examples
from qwen_fused.report.curves import to_pixels
from qwen_fused.report.draw_grids import draw_rows
from qwen_fused.report.trackers import Trackers

METRICS = (
    "step",
    "epoch",
    "loss",
    "efe",
    "size_loss",
    "policy_loss",
    "reward",
    "qwen_grad",
    "prompt_grad",
    "agent_grad",
    "policy_grad",
    "mask_ratio",
    "accuracy",
    "solved",
    "size_accuracy",
    "truncated",
    "nonfinite",
    "lr_qwen",
    "lr_agent",
    "episodes_per_second",
)
# what the log line says
LINE = ("reward", "loss", "qwen_grad", "mask_ratio", "accuracy")


class JsonLines:
    """A file of JSON lines with rising steps; a run that goes on from `resume_step` writes the later ones again."""

    def __init__(self, path: Path, resume_step: int | None):
        kept = truncate_rows(path, resume_step) if resume_step is not None else []
        self.count, self._last = len(kept), _step(kept[-1]) if kept else -1
        # line-buffered: a killed run keeps every finished row
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        """One row, unless it is there; what is not finite, which JSON cannot say, as null."""
        # an evaluation that a kill has cut short is done again
        if row["step"] > self._last:
            self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._last = row["step"]

    def sync(self) -> None:
        """Have every row on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        # only where a write has failed, and was reported, is there anything left to write
        with suppress(OSError):
            self._file.close()


class RunLog:
    """Writes a run's log files, and shows it on the terminal: a bar where there is one, plain lines otherwise.

    Args:
        folder: the run folder.
        resume_step: batches the checkpoint to continue from had done; rows after it are cut off, so that every
            batch is in metrics.jsonl once.
        trackers: names of the trackers that get the same numbers.
        config: the run's configuration, plain, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self.folder = folder
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._metrics = JsonLines(folder / "metrics.jsonl", resume_step)
        self._gradients = JsonLines(folder / "gradients.jsonl", resume_step)
        self._predictions = JsonLines(folder / "predictions.jsonl", resume_step)
        self._log = open(folder / "train.log", "a", buffering=1)  # noqa: SIM115
        self._since_line: list[dict[str, Any]] = []
        self._trackers = Trackers(trackers, folder, config or {}, resume_step, self.say)
        if resume_step is not None and self._metrics.count != resume_step:
            self.say(f"metrics.jsonl has rows of {self._metrics.count} of {resume_step} batches: the others are lost.")

    def say(self, text: str) -> None:
        """One line to the terminal and to train.log."""
        self.console.print(text, markup=False)
        self._log.write(text + "\n")

    def metrics(self, metrics: dict[str, Any]) -> None:
        """One batch to metrics.jsonl and to the trackers."""
        values = {name: metrics[name] for name in METRICS}
        self._metrics.write(values)
        self._since_line.append(values)
        # Qwen's norm is not known before the first window ends
        known = {name: value for name, value in values.items() if name != "step" and value is not None}
        self._trackers.scalars(metrics["step"], known)

    def say_trend(self) -> None:
        """The log line, of means since the last one: a batch holds grids of one size, and tells little by itself."""
        self.say(log_line(mean_metrics(self._since_line)))
        self._since_line.clear()

    def gradients(self, step: int, norms: Mapping[str, float]) -> None:
        """The gradient norm of each of Qwen's layers where Qwen steps, to gradients.jsonl and to the trackers."""
        self._gradients.write({"step": step, "norms": dict(norms)})
        self._trackers.scalars(step, {f"qwen_grad/{name}": norm for name, norm in norms.items()})

    def predictions(self, step: int, examples: Sequence[Example]) -> None:
        """What the watched episodes are answered after `step` batches, to predictions.jsonl and as a picture."""
        self._predictions.write({"step": step, "examples": plain_examples(examples, "predictions")})
        if self._trackers:
            rows = [(f"{example.task_id}  ·  {example.verdict}", example.row) for example in examples]
            self._trackers.image(step, "predictions", to_pixels(draw_rows(rows, width=6)))

    def sync(self) -> None:
        """Have every row on disk; before a checkpoint, so that no checkpoint is ahead of its rows."""
        for rows in (self._metrics, self._gradients, self._predictions):
            rows.sync()

    def close(self) -> None:
        """Close every file and tracker."""
        self._trackers.close()
        for rows in (self._metrics, self._gradients, self._predictions):
            rows.close()
        with suppress(OSError):
            self._log.close()

    def progress(self, total: int, done: int, title: str) -> AbstractContextManager[Callable[[int], object]]:
        """A bar over `total` batches, `done` of them already; gives a function to call with the batches done."""
        return progress_bar(self.console, total, done, title)


@contextmanager
def progress_bar(console: Console, total: int, done: int, title: str) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, and nothing elsewhere; gives a function to call with what is done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task(title, total=total, completed=done)
        yield lambda completed: bar.update(task, completed=completed)


def log_line(metrics: dict[str, Any]) -> str:
    """The line of the log: `[Batch   50] Reward:  0.1234 | Loss:  4.2345 | Qwen_grad: 2.34e-05 | ...`."""
    # there is none before the first flush of the prompt window
    qwen_grad = f"{metrics['qwen_grad']:.2e}" if metrics["qwen_grad"] is not None else "--"
    return (
        f"[Batch {metrics['step']:4d}] Reward: {metrics['reward']:7.4f} | Loss: {metrics['loss']:7.4f} | "
        f"Qwen_grad: {qwen_grad} | Mask_ratio: {metrics['mask_ratio']:.4f} | "
        f"Accuracy: {metrics['accuracy']:.4f}"
    )


def mean_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last of these rows with each figure's mean over those that have one; what is not finite counts as none.

    A figure that is not finite in any of them stays as it is in the last.
    """
    means = dict(rows[-1])
    for name in LINE:
        known = [row[name] for row in rows if row[name] is not None and math.isfinite(row[name])]
        if known:
            means[name] = math.fsum(known) / len(known)
    return means


def truncate_rows(path: Path, step: int) -> list[bytes]:
    """Take the rows after a step, and rows that are cut short, out of a file of rows; returns those that are left."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    return kept


def _step(line: bytes) -> float:
    """The step of a metrics row; what is no row counts as after everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _finite(value: Any) -> Any:
    """Plain values with None for every NaN and Inf."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
