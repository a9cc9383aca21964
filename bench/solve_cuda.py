"""Solve tasks side by side on one device, and write what came of it: solved, seconds a task, memory.

    python bench/solve_cuda.py --tasks held-out eval100 --steps 100 300 1000 --max-seconds 120 --check --out x.json
    python bench/solve_cuda.py --steps 100 --variants "T = 5" "lr 1e-3" --out x.json

The task sets are those of solve_recipe.py, the variants ablate_recipe.py's of settings and planners; from random
weights, or from the start that a run has learned (--run). Every number of steps is written when it is through. A GPU
second is a second of wall time: the device does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import traceback
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from ablate_recipe import CONFIGS, SETTINGS
from machine import device_name, output_of
from solve_recipe import chosen_tasks, solved, typed

from qwen_fused.arc.episodes import Task
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import captured
from qwen_fused.solver.adapt import adapt
from qwen_fused.solver.adapt_many import TrainingStep, adapt_many
from qwen_fused.solver.chunks import cell_bytes, cost_canvas, free, free_bytes, make_chunks, run_chunks
from qwen_fused.solver.examples import canvas_of
from qwen_fused.solver.parts import narrowed
from qwen_fused.solver.question import Question
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solve import make_questions
from qwen_fused.solver.stacked import StackedPlanner, stack_prompts
from qwen_fused.solver.task_planner import encode_task
from qwen_fused.train.run_start import with_start
from qwen_fused.train.saved import load_model


def measure(planner: QwenPlanner, tasks: list[Task], settings: SolveSettings, max_seconds: float) -> dict:
    """Solve tasks, at most for so long, and say what came of it."""
    device = planner.agent.copy_scale.device
    by_id = {task.id: task for task in tasks}
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.monotonic()
    questions = list(make_questions(planner, tasks, settings))
    read = time.monotonic() - started
    chunks: list[dict] = []

    def on_step(chunk: Sequence[Task], step: int) -> None:
        now = time.monotonic() - started
        if step == 1:
            canvas = canvas_of([cost_canvas(task) for task in chunk])
            chunks.append({"tasks": len(chunk), "canvas": canvas, "first_step": now})
        chunks[-1] |= {"steps": step, "last_step": now}

    rows = []
    begun = time.monotonic()
    for result in run_chunks(planner.agent, iter(questions), settings, deadline=started + max_seconds, on_step=on_step):
        task = by_id[result.answer.task_id]
        rows.append({
            "task": task.id, "canvas": cost_canvas(task), "solved": solved(task, result.answer.attempts, 2),
            "first": solved(task, result.answer.attempts, 1), "seconds": result.answer.seconds,
            "steps": result.answer.steps, "cut": result.cut, "failed": result.failed,
            "own_solved": result.answer.own_solved, "confidence": result.confidence,
            "loss": result.answer.losses[-1] if result.answer.losses else None,
        })  # fmt: skip
    seconds = time.monotonic() - begun
    for chunk in chunks:
        chunk["ms_a_step"] = 1000 * (chunk["last_step"] - chunk["first_step"]) / max(chunk["steps"] - 1, 1)
    done = [row for row in rows if not row["failed"]]
    return {
        "tasks": len(tasks),
        "answered": len(done),
        "cut": sum(row["cut"] for row in done),
        "failed": sorted({row["failed"] for row in rows if row["failed"]}),
        "solved": sum(row["solved"] for row in done),
        "first": sum(row["first"] for row in done),
        "own_solved": sum(row["own_solved"] for row in done) / max(len(done), 1),
        "seconds": seconds,
        "reading_seconds": read,
        "seconds_a_task": seconds / max(len(done), 1),
        "tasks_a_minute": 60 * len(done) / seconds,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "ids": [row["task"] for row in done if row["solved"] == 1],
        "chunks": chunks,
        "rows": rows,
    }


def check(planner: QwenPlanner, tasks: list[Task], settings: SolveSettings) -> dict:
    """Losses side by side on the device, in a graph and not, against those of one task at a time on the CPU."""
    small = sorted(tasks, key=lambda task: cost_canvas(task))[:3]
    on_cpu = deepcopy(planner).cpu()
    alone = torch.tensor([adapt(on_cpu, task, settings).losses for task in small])
    found: dict = {}
    for name, capture in (("graph", True), ("eager", False)):
        captured.CAPTURE = capture
        try:
            encoded = [encode_task(planner, task, settings.symmetries) for task in small]
            losses = torch.tensor(adapt_many(planner.agent, encoded, list(map(narrowed, small)), settings).losses)
            found[name] = (losses - alone).abs().amax(0).tolist()
        except Exception:
            traceback.print_exc()
            found[name] = None
        free(planner.agent.copy_scale.device)
    captured.CAPTURE = found["graph"] is not None
    return found


def profile(planner: QwenPlanner, tasks: list[Task], settings: SolveSettings) -> str:
    """Where a step's time goes, of the chunk with most cells: steps outside of a graph, by operator."""
    device = planner.agent.copy_scale.device
    questions = [q for q in make_questions(planner, tasks, settings) if isinstance(q, Question)]
    chunks = make_chunks(
        questions, lambda q: cost_canvas(q.shown), cell_bytes(planner.agent, settings), free_bytes(device) / 2
    )
    chosen = max(chunks, key=lambda chunk: sum(h * w for h, w in (cost_canvas(q.shown) for q in chunk)))
    own = [q.shown for q in chosen]
    encoded = [encode_task(planner, task, settings.symmetries) for task in own]
    stacked = StackedPlanner(planner.agent, *stack_prompts(encoded, device), muon=settings.matrix_lr > 0)
    step = TrainingStep(stacked, own, settings)
    step.run(0, 1.0)
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(2):
            step.step()
        if cuda:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = found.key_averages(group_by_input_shape=True).table(
        sort_by=order, row_limit=60, max_name_column_width=60, max_shapes_column_width=60
    )
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    head = f"{len(own)} tasks on {step.table.canvas}, two steps, {len(kernels)} kernels"
    return f"{head}\n{table}\n{found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["held-out", "eval100"])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 300, 1000])
    parser.add_argument("--max-seconds", type=float, default=120.0, help="for each number of steps of each set")
    parser.add_argument("--limit", type=int, help="only so many tasks of each set")
    parser.add_argument("--run", type=Path, help="whose start is begun from; default: random weights")
    parser.add_argument("--variants", nargs="+", default=["base"], choices=[*SETTINGS, *CONFIGS], metavar="VARIANT")
    parser.add_argument("--set", nargs="*", default=[], help="settings, as name=value")
    parser.add_argument("--config", nargs="*", default=[], help="of the planner, as name=value")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32")
    parser.add_argument("--check", action="store_true", help="three tasks' losses against one by one on the CPU, first")
    parser.add_argument("--profile", type=Path, help="write where a step's time goes, of the first set, and end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    plain = {"seed": args.seed, **typed(SolveSettings, args.set)}
    if args.profile:
        settings = SolveSettings(**{**plain, "steps": 10})
        args.profile.write_text(profile(start_of(args, {}), chosen_tasks(args.tasks[0])[: args.limit], settings))
        return
    found: dict = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "machine": device_name(device),
        "torch": torch.__version__,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "results": [],
    }
    if args.check:
        settings = SolveSettings(**{**plain, "steps": 8})
        found["check"] = check(start_of(args, {}), chosen_tasks(args.tasks[0]), settings)
        print("losses of three tasks against one by one on the CPU, step by step:", found["check"], flush=True)
        if not captured.CAPTURE:
            print("no graph could be captured: steps run launch by launch", flush=True)
    for variant, name, steps in itertools.product(args.variants, args.tasks, args.steps):
        planner = start_of(args, CONFIGS.get(variant, {}))
        settings = SolveSettings(**{**plain, "steps": steps, **SETTINGS.get(variant, {})})
        result = measure(planner, chosen_tasks(name)[: args.limit], settings, args.max_seconds)
        found["results"].append({"variant": variant, "set": name, "steps": settings.steps, **result})
        shown = {key: result[key] for key in result if key not in ("ids", "chunks", "rows")}
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in shown.items()}
        print(variant, name, settings.steps, shown, flush=True)
        for chunk in result["chunks"]:
            print("   ", {k: round(v, 2) if isinstance(v, float) else v for k, v in chunk.items()}, flush=True)
        if args.out:
            args.out.write_text(json.dumps(found))


def start_of(args: argparse.Namespace, changes: dict) -> QwenPlanner:
    """What every task begins from."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    if args.run:
        planner, learned = with_start(load_model(args.run, "last", device), args.run)
        assert learned, "the run has no start"
        return planner
    return QwenPlanner(TrainConfig(**{"seed": args.seed, **typed(TrainConfig, args.config), **changes})).to(device)


if __name__ == "__main__":
    main()
