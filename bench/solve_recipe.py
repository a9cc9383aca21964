"""Solve tasks by test-time training with any settings, and write what came of it: one experiment, one JSON.

    python bench/solve_recipe.py --tasks screen --stride 2 --set steps=100 lr=2e-3 --config plan_steps=8 --out x.json

Tasks: screen (held-out and public evaluation tasks with sides up to 16, to decide by), held-out (forty of arc1's
training tasks), eval100 (every fourth of arc1's public evaluation tasks), others (the other 300, which nothing is
decided by), small (half of the held-out screen), large (the other training tasks with a side above 12, to decide by on
a GPU). From random weights, from the start that a run has learned (--run), or from the run's own agent (--run
--agent).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import device_name, output_of

from qwen_fused.arc.episodes import Task, load_tasks
from qwen_fused.arc.split import split_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import adapt
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_planner import encode_task
from qwen_fused.solver.task_solver import solve_task
from qwen_fused.train.run_start import with_start
from qwen_fused.train.saved import load_model


def side(task: Task) -> int:
    """The longest side of a task's grids, answers of test pairs left out."""
    shapes = [g.shape for p in task.train for g in (p.input, p.output)] + [p.input.shape for p in task.test]
    return max(max(shape) for shape in shapes)


def chosen_tasks(name: str) -> list[Task]:
    """The tasks of a named set."""
    training, held_out = (list(tasks) for tasks in split_tasks(load_tasks("arc1").tasks, 0.1, 0))
    public = load_tasks("arc1", "evaluation").tasks
    evaluation = list(public[::4])
    sets = {
        "held-out": held_out,
        "large": [t for t in training if side(t) > 12],
        "eval100": evaluation,
        "others": [task for number, task in enumerate(public) if number % 4],
        "screen": [t for t in held_out if side(t) <= 16] + [t for t in evaluation if side(t) <= 16][::3],
        "small": [t for t in held_out if side(t) <= 16][::2],
    }
    return sets[name]


def typed(cls: type, pairs: list[str]) -> dict:
    """["steps=100"] as keyword arguments of a dataclass."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        assert key in fields, key
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def solved(task: Task, attempts: tuple, tries: int) -> float:
    """Share of the test inputs whose answer is among the first attempts."""
    return float(np.mean([
        any(np.array_equal(grid, pair.output) for grid in grids[:tries])
        for pair, grids in zip(task.test, attempts, strict=True)
    ]))  # fmt: skip


def prompts_of(whose: str, tasks: list[Task]) -> Callable:
    """`encode_task` with the prompt of the task itself, of the one after it, or all zeros; sizes are always its own."""
    following = dict(zip((t.id for t in tasks), tasks[1:] + tasks[:1], strict=True))

    def encode(planner: QwenPlanner, task: Task, symmetries: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, sizes = encode_task(planner, task, symmetries)
        if whose == "other":
            prompt = encode_task(planner, following[task.id], symmetries)[0]
        return (torch.zeros_like(prompt) if whose == "off" else prompt), sizes

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="screen")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="of the tasks, for several processes with one stride")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--config", nargs="*", default=[])
    parser.add_argument("--weights", default="last")
    parser.add_argument("--agent", action="store_true", help="from the run's own agent, not from its start")
    parser.add_argument("--prompt", choices=("own", "other", "off"), default="own", help="whose prompt Qwen gives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    settings = SolveSettings(**{"seed": args.seed, **typed(SolveSettings, args.set)})
    if args.run:
        planner = load_model(args.run, args.weights)
        if not args.agent:
            planner, learned = with_start(planner, args.run)
            assert learned, "the run has no start"
    else:
        planner = QwenPlanner(TrainConfig(**{"seed": args.seed, **typed(TrainConfig, args.config)}))
    tasks = chosen_tasks(args.tasks)[args.first :: args.stride][: args.limit]
    adapt.encode_task = prompts_of(args.prompt, tasks)
    rows = []
    for task in tasks:
        started = time.process_time()
        answer = solve_task(planner, task, settings)
        row = {
            "task": task.id,
            "side": side(task),
            "solved": solved(task, answer.attempts, 2),
            "first": solved(task, answer.attempts, 1),
            "cpu_seconds": time.process_time() - started,
            "steps": answer.steps,
            "loss": float(np.mean(answer.losses[-10:])) if answer.losses else None,
            "own_accuracy": answer.own_accuracy,
            "own_solved": answer.own_solved,
            "confidence": answer.confidence,
        }
        rows.append(row)
        if not args.quiet:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    seconds = np.array([row["cpu_seconds"] for row in rows])
    summary = {
        "tasks": len(rows),
        "solved": sum(row["solved"] for row in rows),
        "first": sum(row["first"] for row in rows),
        "seconds": float(seconds.mean()),
        "own_solved": float(np.mean([row["own_solved"] for row in rows])),
        "ids": [row["task"] for row in rows if row["solved"] == 1],
    }
    print(summary, " ".join(args.set + args.config), f"seed={args.seed} run={args.run}", flush=True)
    if args.out:
        origin = {
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "machine": device_name(torch.device("cpu")),
            "commit": output_of("git", "rev-parse", "HEAD"),
        }
        args.out.write_text(json.dumps({**origin, **summary, "rows": rows}))


if __name__ == "__main__":
    main()
