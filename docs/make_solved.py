"""Draw docs/solved.png: held-out tasks that a run solves after training on each; the others are left out, and counted.

python docs/make_solved.py RUN [--steps 100] [--rows 6]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.arc.split import divide
from qwen_fused.arc.tasks import Task
from qwen_fused.report.draw_grids import ARC_COLORS, CaptionedGrid, draw_rows
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solution import Solution
from qwen_fused.train.saved import load_model
from qwen_fused.train.solve_run import solve

OUT = Path(__file__).with_name("solved.png")


def row_of(task: Task, attempt: np.ndarray) -> tuple[str, list[CaptionedGrid]]:
    """Two demonstrations, the query, and the attempt, which is the answer."""
    grids = [
        (name, grid) for pair in task.train[:2] for name, grid in (("shown", pair.input), ("becomes", pair.output))
    ]
    grids += [("asked", task.test[0].input), ("answered", attempt)]
    return task.id, [(name, grid, ARC_COLORS) for name, grid in grids if grid is not None]


def solved_rows(solution: Solution) -> list[tuple[str, list[CaptionedGrid]]]:
    """A row for each task whose first attempt at its first test input is right, those with the most colours first."""
    rows = []
    for task in solution.tasks:
        attempt = solution.results[task.id].answer.attempts[0][0]
        if task.test[0].output is not None and np.array_equal(attempt, task.test[0].output):
            rows.append((len(np.unique(attempt)), row_of(task, attempt)))
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=6)
    args = parser.parse_args()
    config = load_model(args.run).config
    held_out = divide(
        load_tasks(config.dataset).tasks, config.val_fraction, config.split_seed, config.held_out
    ).held_out
    solution = solve(held_out, run=args.run, settings=SolveSettings(steps=args.steps))
    rows = solved_rows(solution)
    print(f"{len(rows)} of {len(held_out)} in the first attempt; drawn: {min(args.rows, len(rows))}")
    draw_rows(rows[: args.rows], width=9).savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
