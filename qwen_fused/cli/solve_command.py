"""`qwen-fused solve`: answers to tasks, by training on each of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_fused.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class SolveCommand:
    """Answer ARC tasks by training on each task's own demonstrations, and write a submission and a page.

    The same command with the same `--out` goes on where it was stopped, and ends with the same submission.
    """

    tasks: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASKS")]
    """arc1, arc2, a folder of tasks, a task file, or a Kaggle challenges file."""
    run: Path | None = None
    """Run folder whose weights every task starts from; without one the weights are random."""
    weights: Literal["last", "best"] = "last"
    """A run's newest checkpoint, or the best one on its held-out tasks."""
    split: str | None = None
    """Part of the tasks: training, evaluation or another that is there; evaluation, or the only one there is."""
    ttt_steps: int | None = None
    """Most training steps on a task; 0 answers with the weights as they are. The default is the measured recipe's."""
    task_seconds: float | None = None
    """Most seconds of training on a task; the learning rate falls with them. Answers then depend on the clock too."""
    max_minutes: float | None = None
    """Most minutes for all tasks; the small ones come first, and those not reached get their query for an answer."""
    workers: int | None = None
    """Processes with a thread each, on the CPU: one per core, or none on a GPU. Any number gives the same answers."""
    limit: int | None = None
    """Only the first so many tasks by id."""
    seed: int = 0
    """Seed of random weights, order and augmentation."""
    device: str = "auto"
    """Where Qwen reads, and without --workers where tasks are trained on side by side: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder for submission.json, results.jsonl, score.json, solve.html; a new one in solves/."""


def run_solve(arguments: Sequence[str]) -> int:
    """`qwen-fused solve`."""
    command = parse(SolveCommand, "solve", arguments)
    from qwen_fused.solver.settings import SolveSettings
    from qwen_fused.train.solve_run import SolveStopped, new_solve_folder, solve

    settings = SolveSettings(seed=command.seed, task_seconds=command.task_seconds)
    if command.ttt_steps is not None:
        settings = replace(settings, steps=command.ttt_steps)
    try:
        solve(
            command.tasks,
            run=command.run,
            split=command.split,
            settings=settings,
            workers=command.workers,
            limit=command.limit,
            max_minutes=command.max_minutes,
            out=command.out or new_solve_folder(Path("solves")),
            weights=command.weights,
            device=command.device,
        )
    except SolveStopped as stopped:
        print(f"qwen-fused: {stopped}", file=sys.stderr)
        return 1
    return 0
