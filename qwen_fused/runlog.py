"""What a run says: the log line, train.log, metrics.jsonl, and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    "nonfinite",
    "lr_qwen",
    "lr_agent",
    "episodes_per_second",
)


class RunLog:
    """Writes a run's log files, and shows it on the terminal: a bar where there is one, plain lines otherwise.

    Args:
        folder: the run folder.
        resume_step: batches the checkpoint to continue from had done; rows after it are cut off, so that every
            batch is in metrics.jsonl once.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None):
        self.folder = folder
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        metrics = folder / "metrics.jsonl"
        if resume_step is not None and metrics.exists():
            kept = [line for line in metrics.read_text().splitlines(keepends=True) if _step(line) <= resume_step]
            metrics.write_text("".join(kept))
        # line-buffered: a killed run keeps every finished row
        self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115
        self._log = open(folder / "train.log", "a", buffering=1)  # noqa: SIM115

    def say(self, text: str) -> None:
        """One line to the terminal and to train.log."""
        self.console.print(text, markup=False)
        self._log.write(text + "\n")

    def row(self, metrics: dict[str, Any]) -> None:
        """One batch to metrics.jsonl."""
        self._metrics.write(json.dumps({name: metrics[name] for name in METRICS}) + "\n")

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._log.close()

    @contextmanager
    def progress(self, total: int, done: int, title: str) -> Iterator[Any]:
        """A bar over `total` batches, `done` of them already; gives a function to call with the batches done."""
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
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


def _step(line: str) -> float:
    """The step of a metrics row; a row cut short by a kill counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
