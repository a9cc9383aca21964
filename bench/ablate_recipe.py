"""What each part of the recipe of test-time training is worth: one part changed at a time, the same tasks and steps.

    python bench/ablate_recipe.py --out ablation.jsonl [--only base "T = 5" ...] [--seed 1] [--limit 10] [--start RUN]

Tasks: of the held-out forty those with sides up to 16, and of the hundred public evaluation tasks (every fourth) those
with sides up to 10. A row a variant is written as soon as it is known; those that are in the file already are left
out. From random weights, or from the start that a run has learned. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import device_name, output_of
from solve_recipe import chosen_tasks, side, solved
from torch import Tensor

from qwen_fused.arc.episodes import Task
from qwen_fused.config import TrainConfig
from qwen_fused.loss.efe_loss import EFEWeights
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import adapt, task_planner, task_solver
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.train.run_start import with_start
from qwen_fused.train.saved import load_model

# name -> what differs in SolveSettings
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "steps 50": {"steps": 50},
    "steps 200": {"steps": 200},
    "batch 4, steps 200": {"batch": 4, "steps": 200},
    "batch 16, steps 50": {"batch": 16, "steps": 50},
    "matrix_lr 0.01": {"matrix_lr": 0.01},
    "matrix_lr 0.04": {"matrix_lr": 0.04},
    "lr 1e-3": {"lr": 1e-3},
    "lr 4e-3": {"lr": 4e-3},
    "AdamW alone": {"matrix_lr": 0.0},
    "no symmetries": {"symmetries": 1, "votes": 1},
    "no recolouring": {"recolored": 0.0},
    "one vote": {"votes": 1},
    "8 votes": {"votes": 8},
    "last step alone": {"early_step_weight": 0.0},
    "steps before the last 0.1": {"early_step_weight": 0.1},
    "average of weights 0.95": {"average": 0.95},
}
# name -> what differs in TrainConfig; from random weights alone
CONFIGS: dict[str, dict[str, Any]] = {
    "T = 5": {"plan_steps": 5},
    "T = 8": {"plan_steps": 8},
    "64 channels": {"agent_channels": 64},
    "64 channels, T = 5": {"agent_channels": 64, "plan_steps": 5},
    "96 channels": {"agent_channels": 96},
}


@contextmanager
def trained(*kept: str) -> Iterator[None]:
    """Train the parameters alone whose names have one of these parts."""
    made_planner, made_optimizer = adapt.TaskPlanner, adapt.TaskOptimizer

    def chosen(name: str) -> bool:
        return any(part in name for part in kept)

    def build(*arguments: Any) -> task_planner.TaskPlanner:
        model = made_planner(*arguments)
        for name, parameter in model.named_parameters():
            if not chosen(name):
                # of no weight in the norm that is clipped
                parameter.register_hook(torch.zeros_like)
        return model

    def optimizer(named: Any, settings: SolveSettings) -> Any:
        return made_optimizer([(name, parameter) for name, parameter in named if chosen(name)], settings)

    with mock.patch.object(adapt, "TaskPlanner", build), mock.patch.object(adapt, "TaskOptimizer", optimizer):
        yield


@contextmanager
def qwen_trained(lr: float = 1e-4, window: int = 10) -> Iterator[None]:
    """Qwen and its projection are trained on the task too: a step for every so many of the planner's."""
    made = adapt.adapt

    def through(planner: QwenPlanner, task: Task, settings: SolveSettings, **options: Any) -> adapt.Adapted:
        own = deepcopy(planner)
        models: list[task_planner.TaskPlanner] = []
        optimizer = torch.optim.AdamW(own.prompt.parameters(), lr=lr)

        class Seen(adapt.Average):
            def __init__(self, model: Any, decay: float) -> None:
                super().__init__(model, decay)
                model.prompts.requires_grad_()
                models.append(model)

        def flush(step: int, _: float) -> None:
            prompts = models[-1].prompts
            if step % window or prompts.grad is None:
                return
            own.prompt([task.train]).prompt.backward(prompts.grad.sum(0, keepdim=True))
            optimizer.step()
            optimizer.zero_grad()
            prompts.grad = None
            prompts.data.copy_(adapt.encode_task(own, task, len(prompts))[0])

        with mock.patch.object(adapt, "Average", Seen):
            return made(own, task, settings, on_step=flush)

    with mock.patch.object(task_solver, "adapt", through):
        yield


@contextmanager
def loss_of(hard_mode: str = "none", **weights: float) -> Iterator[None]:
    """Another loss: of the expected free energy's terms those that need no backward plan, or hard cells."""
    chosen = EFEWeights(**{"risk": 0.0, "ambiguity": 0.0, "agreement": 0.0, "anchor": 0.0, "prompt": 0.0, **weights})

    def loss(plan: Tensor, target: Tensor, **options: Any) -> Any:
        more: dict[str, Any] = {"weights": chosen, "hard_mode": hard_mode}
        if chosen.risk:
            # the colours of a place, from all the targets of the batch: what a preference can learn within a task
            counts = torch.nn.functional.one_hot(target.clamp(0, 9), 10).movedim(-1, 1).float().mean(0, keepdim=True)
            more["preference_logits"] = (counts + 0.05).log().expand(len(target), -1, -1, -1)
        return made(plan, target, **{**options, **more})

    made = task_planner.efe_loss
    with mock.patch.object(task_planner, "efe_loss", loss):
        yield


@contextmanager
def left_out_prompts() -> Iterator[None]:
    """The prompt of a training episode is made of the other pairs; the answer's of all of them."""
    made_set, made_planner, encode = adapt.TrainingSet, adapt.TaskPlanner, adapt.encode_task

    class Planner(made_planner):  # type: ignore[misc,valid-type]
        def __init__(self, agent: Any, prompts: Tensor, sizes: Tensor) -> None:
            super().__init__(agent, prompts[: len(sizes)], sizes)
            self.register_buffer("every", prompts)

        def forward(self, batch: Any, readouts: int | None = None) -> tuple[Tensor, Tensor]:
            own = batch.symmetry % len(self.demo_sizes)
            prompt = self.every[batch.symmetry] + self.offset[own]
            return self.agent.plan(batch.cells, prompt, readouts), self.agent.size_head(
                prompt, batch.query_size, self.demo_sizes[own]
            )

    class Set(made_set):  # type: ignore[misc,valid-type]
        def batch(self) -> Any:
            drawn: list = []
            with mock.patch.object(self, "draw", lambda: drawn.extend(made_set.draw(self)) or drawn):
                made = super().batch()
            if len(self.pairs) > 1:
                made.symmetry = made.symmetry + self.settings.symmetries * torch.tensor([1 + pair for pair, _ in drawn])
            return made

    def encode_each(planner: QwenPlanner, task: Task, symmetries: int) -> tuple[Tensor, Tensor]:
        prompts, sizes = encode(planner, task, symmetries)
        if len(task.train) > 1:
            others = [Task(task.id, task.train[:k] + task.train[k + 1 :], task.test) for k in range(len(task.train))]
            prompts = torch.cat([prompts, *[encode(planner, other, symmetries)[0] for other in others]])
        return prompts, sizes

    with (
        mock.patch.object(adapt, "TrainingSet", Set),
        mock.patch.object(adapt, "TaskPlanner", Planner),
        mock.patch.object(adapt, "encode_task", encode_each),
    ):
        yield


@contextmanager
def stopped_by_left_out(every: int = 10) -> Iterator[None]:
    """First without the last pair, which is asked every few steps; then with all, for the steps it was best at."""
    made = adapt.adapt

    def twice(planner: QwenPlanner, task: Task, settings: SolveSettings, **options: Any) -> adapt.Adapted:
        if len(task.train) < 3:
            return made(planner, task, settings, **options)
        fewer, asked = Task(task.id, task.train[:-1], task.test), Task(task.id, task.train[-1:], task.test)
        found: list[tuple[float, int]] = []
        models: list[task_planner.TaskPlanner] = []

        class Seen(adapt.Average):
            def __init__(self, model: Any, decay: float) -> None:
                super().__init__(model, decay)
                models.append(model)

        def ask(step: int, _: float) -> None:
            if step % every == 0:
                found.append((adapt.own_accuracy(models[-1], asked)[0], step))

        with mock.patch.object(adapt, "Average", Seen):
            made(planner, fewer, settings, on_step=ask)
        # of equals the latest
        steps = max(found)[1] if found else settings.steps
        return made(planner, task, settings, steps=steps)

    def stopping(planner: QwenPlanner, task: Task, settings: SolveSettings, *, steps: int = 0, **options: Any) -> Any:
        if not steps:
            return original(planner, task, settings, **options)
        at = adapt.Schedule.at
        # the rate falls as it would have
        with mock.patch.object(adapt.Schedule, "at", lambda self, n: at(self, n) if n < steps else None):
            return original(planner, task, settings, **options)

    original, made = made, stopping
    with mock.patch.object(task_solver, "adapt", twice):
        yield


@contextmanager
def policy_asked() -> Iterator[None]:
    """The policy refines the prompt, at its mean, before the planner is trained on the task."""
    encode = adapt.encode_task

    def refined(planner: QwenPlanner, task: Task, symmetries: int) -> tuple[Tensor, Tensor]:
        _, sizes = encode(planner, task, symmetries)
        with evaluating(planner):
            read = planner.prompt([task.train])
            prompt = planner.policy(read.prompt, read.control, read.features, sample=False).refined
        return prompt.repeat(symmetries, 1), sizes

    with mock.patch.object(adapt, "encode_task", refined):
        yield


PATCHES: dict[str, Callable[[], Any]] = {
    "offset, size head and readout trained": lambda: trained("offset", "size_head", "readout"),
    "all but the offset trained": lambda: trained("agent"),
    "offset alone trained": lambda: trained("offset"),
    "Qwen trained too, through its window": qwen_trained,
    "whole grids": lambda: mock.patch.object(adapt, "narrowed", lambda task: task),
    "the policy's step": policy_asked,
    "hard cells": lambda: loss_of("cell"),
    "hard episodes": lambda: loss_of("episode"),
    "risk 0.05": lambda: loss_of(risk=0.05),
    "prompts leave the episode's pair out": left_out_prompts,
    "steps by the pair left out": stopped_by_left_out,
}


def tasks_of(limit: int | None) -> list[Task]:
    """Those that the module's head names."""
    held_out = [task for task in chosen_tasks("held-out") if side(task) <= 16]
    return [*held_out, *(task for task in chosen_tasks("eval100") if side(task) <= 10)][:limit]


def measured(planner: QwenPlanner, tasks: list[Task], settings: SolveSettings) -> dict[str, Any]:
    """Tasks solved and CPU seconds of one variant."""
    started, rows = time.process_time(), []
    for task in tasks:
        answer = task_solver.solve_task(planner, task, settings)
        rows.append((solved(task, answer.attempts, 2) == 1, answer.own_solved, answer.steps))
    right, own, steps = zip(*rows, strict=True)
    return {
        "tasks": len(tasks),
        "solved": sum(right),
        "own_solved": round(float(np.mean(own)), 3),
        "steps": round(float(np.mean(steps)), 1),
        "cpu_seconds": round((time.process_time() - started) / len(tasks), 2),
        "ids": [task.id for task, is_right in zip(tasks, right, strict=True) if is_right],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*SETTINGS, *CONFIGS, *PATCHES])
    parser.add_argument("--start", type=Path, help="run whose start is begun from")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = {"machine": device_name(torch.device("cpu")), "commit": output_of("git", "rev-parse", "HEAD")}
    known = {json.loads(line)["variant"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for name in args.only or [*SETTINGS, *CONFIGS, *PATCHES]:
        if name in known or (args.start and name in CONFIGS):
            continue
        torch.manual_seed(args.seed)
        settings = SolveSettings(**{"seed": args.seed, "steps": args.steps, **SETTINGS.get(name, {})})
        if args.start:
            planner = with_start(load_model(args.start, "last"), args.start)[0]
        else:
            planner = QwenPlanner(TrainConfig(**{"seed": args.seed, **CONFIGS.get(name, {})}))
        with PATCHES[name]() if name in PATCHES else mock.patch.object(adapt, "__doc__", ""):
            row = {"variant": name, "seed": args.seed, **measured(planner, tasks_of(args.limit), settings), **origin}
        print({key: row[key] for key in ("variant", "solved", "own_solved", "steps", "cpu_seconds")}, flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
