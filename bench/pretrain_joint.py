"""Train one planner on all training tasks at once, each with an offset of its own on the prompt: a start to adapt from.

    python bench/pretrain_joint.py --cpu-seconds 600 --out start.pt
    python bench/solve_recipe.py --start start.pt

A training task is seen exactly as `adapt` will see an unseen one: its pairs through random views, the forward plan
alone, and a prompt that the task learns for itself. The weights that all tasks share are then weights from which a
task is near. Held-out tasks of `split_tasks(..., 0.1, 0)` and the evaluation set are never read.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from solve_recipe import side

from qwen_fused.arc.episodes import Task, load_tasks
from qwen_fused.arc.split import split_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.adapt import Average, step_weights
from qwen_fused.solver.examples import TrainingSet, task_rng
from qwen_fused.solver.settings import SolveSettings

OFFSET_RATE = 5.0
"""Learning rate of a task's offset in units of the shared weights': it is seen a few hundredths as often."""


def training_tasks(largest: int) -> list[Task]:
    """Training tasks with sides up to `largest`; their test pairs are pairs like the others."""
    tasks = split_tasks(load_tasks("arc1").tasks, 0.1, 0)[0]
    return [replace(task, train=task.train + task.test) for task in tasks if side(task) <= largest]


class Offsets:
    """A learned prompt for each task and symmetry, [tasks, 8, D], each stepped by Adam when its task is seen."""

    def __init__(self, tasks: int, width: int):
        self.value, self.mean, self.square = (torch.zeros(tasks, 8, width) for _ in range(3))
        self.seen = np.zeros(tasks)

    def step(self, task: int, gradient: torch.Tensor, lr: float) -> None:
        """One Adam step of a task's offset; symmetries without a gradient stay."""
        self.seen[task] += 1
        mean, square = self.mean[task].lerp_(gradient, 0.1), self.square[task].lerp_(gradient.square(), 0.05)
        mean, square = mean / (1 - 0.9 ** self.seen[task]), square / (1 - 0.95 ** self.seen[task])
        self.value[task] -= lr * mean / (square.sqrt() + 1e-8) * (gradient != 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tasks-per-step", type=int, default=3)
    parser.add_argument("--largest", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    config = TrainConfig()
    agent = GridAgent(channels=config.agent_channels, prompt_dim=config.prompt_dim, steps=config.plan_steps)
    tasks = training_tasks(args.largest)
    settings = SolveSettings(seed=args.seed)
    sets = [TrainingSet(task, settings, task_rng(settings, task.id)) for task in tasks]
    offsets = Offsets(len(tasks), config.prompt_dim)
    shared = [p for name, p in agent.named_parameters() if not name.startswith("size_head")]
    optimizer = torch.optim.AdamW(shared, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    average, weight = Average(agent, 0.998), step_weights(agent.steps, settings.early_step_weight)
    rng, order, losses = np.random.default_rng(args.seed), [], []
    started, said, step = time.process_time(), 0.0, 0
    while (spent := time.process_time() - started) < args.cpu_seconds:
        progress = spent / args.cpu_seconds
        lr = args.lr * min(1.0, (step + 1) / 50, (1 - progress) / 0.3 + 0.03)
        for _ in range(args.tasks_per_step):
            order = order or rng.permutation(len(tasks)).tolist()
            task = order.pop()
            batch = sets[task].batch()
            offset = offsets.value[task].clone().requires_grad_()
            plan = agent.plan(batch.cells, offset[batch.symmetry])
            out = efe_loss(plan, batch.target, step_weight=weight, weights=None, hard_mode="none")  # type: ignore[arg-type]
            (out.loss / args.tasks_per_step).backward()
            offsets.step(task, offset.grad, OFFSET_RATE * lr)  # type: ignore[arg-type]
            losses.append((out.loss.item(), out.solved.double().mean().item()))
        torch.nn.utils.clip_grad_norm_(shared, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        step += 1
        if spent - said > 60:
            said = spent
            loss, solved = np.mean(losses[-300:], 0)
            print(f"{spent:.0f} s, step {step}: loss {loss:.4f}, episodes solved {solved:.3f}", flush=True)
    average.swap_in()
    save_file(agent.state_dict(), args.out)
    print(f"{step} steps, {len(tasks)} tasks, {args.out}")


if __name__ == "__main__":
    main()
