"""A start that tasks are near: first-order MAML (Finn et al. 2017) and Reptile (Nichol et al. 2018) over tasks.

    start ─► a copy is trained on a task but for one pair, as `adapt` trains it ─► loss on the pair left out
      ▲            │ Reptile: a share of the way                                          │ its gradient there,
      └────────────┴─────────────────── MAML: a step of AdamW ◄───────────────────────────┘ taken for the start's

Random weights are far from every task, and so are weights that were trained to answer without training: neither has
ever been asked to learn. Reptile alone makes a start that learns the pairs it is shown soon; the pair left out is what
asks it to learn the rule. No gradient passes through the steps themselves. The start is apart from the run's own agent,
which goes on answering as it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.tasks import Task
from qwen_fused.config import require
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.adapt import adapt_agent, step_weights
from qwen_fused.solver.adapt_many import adapt_many
from qwen_fused.solver.examples import TrainingSet, canvas_of
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.stacked import stacked_loss
from qwen_fused.solver.task_planner import encode_task, lines_agent, plan_loss
from qwen_fused.solver.view_table import ViewTable

if TYPE_CHECKING:
    from qwen_fused.planner.model import QwenPlanner

# what is done for a task: few steps, since many tasks make a start
INNER = SolveSettings(steps=20)
# share of the way to a task's weights that the start goes, and AdamW's learning rate by the pair left out; both fall to
# a fiftieth over the last seven tenths
RATE, OUTER_LR, DECAY_FROM, LEAST = 0.15, 1e-3, 0.3, 0.02
OUTER_BETAS, OUTER_DECAY = (0.9, 0.98), 0.01
# tasks that a GPU trains on at once; the start then goes towards their mean, as far as it would go one by one
SIDE_BY_SIDE = 16


class Start:
    """A start that is being learned, or is done.

    Args:
        agent: what it begins from; changed.
    """

    def __init__(self, agent: GridAgent):
        self.agent = agent
        self.optimizer = torch.optim.AdamW(
            agent.parameters(), lr=OUTER_LR, betas=OUTER_BETAS, weight_decay=OUTER_DECAY, fused=True
        )
        self.tasks = 0
        """Trainings on a task so far."""
        self.done = False
        self.curve: list[float] = []
        """Of each of them the loss on the pair left out, in nats per cell."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        state = {"tasks": self.tasks, "done": self.done, "curve": self.curve}
        return {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tasks, self.done, self.curve = state["tasks"], state["done"], list(state["curve"])

    @torch.no_grad()
    def move(self, found: Trained, share: float) -> None:
        """Go towards where training on some tasks led, and along the gradient found there.

        Args:
            found: on how many tasks it is the mean of decides how far.
            share: of the learning that is done.
        """
        left = max(LEAST, min(1.0, (1 - share) / (1 - DECAY_FROM)))
        way = 1 - (1 - RATE * left) ** len(found.losses)
        for name, parameter in self.agent.named_parameters():
            parameter.lerp_(found.weights[name].to(parameter), way)
            parameter.grad = found.gradients[name].to(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = OUTER_LR * left
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tasks += len(found.losses)
        self.curve += found.losses

    def describe(self) -> str:
        """What tasks cost by now, and did."""
        then, now = mean_of(self.curve[:50]), mean_of(self.curve[-50:])
        return f"loss on a pair left out after {INNER.steps} steps on the others {now:.3f}, {then:.3f} in the beginning"


@dataclass(frozen=True)
class Trained:
    """Where training on some tasks led: means of weights and of gradients by name, and each task's loss."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    losses: list[float]


@dataclass(frozen=True)
class Drawn:
    """A task to train on, which of its pairs is left out, and the seed of all else."""

    task: Task
    left_out: int
    seed: int

    @property
    def rest(self) -> Task:
        """The other train pairs."""
        pairs, k = self.task.train, self.left_out
        return replace(self.task, train=pairs[:k] + pairs[k + 1 :], test=())

    @property
    def asked(self) -> Task:
        """The pair left out."""
        return replace(self.task, train=(self.task.train[self.left_out],), test=())

    def asking(self) -> TrainingSet:
        """Views of the pair left out, recoloured as the others are."""
        rng = np.random.default_rng([self.seed, 1])
        return TrainingSet(self.asked, INNER, rng, colors_of=self.rest)


def learn_start(
    planner: QwenPlanner,
    tasks: Sequence[Task],
    start: Start,
    *,
    most: int,
    seconds: float | None = None,
    seed: int = 0,
    should_stop: Callable[[], object] = lambda: None,
    on_task: Callable[[int], object] = lambda done: None,
) -> None:
    """Go on learning a start, in place, until it is done or something stops it.

    Args:
        planner: its Qwen reads the tasks; it stays as it is.
        tasks: training tasks; the half with the smaller grids is trained on, in turns, by its train pairs alone. Those
            with one train pair are left out.
        start: new, or as it was when it was stopped.
        most: trainings on a task, in all.
        seconds: end after about so many; how far the start goes falls with them.
        seed: of the order, and of each training.
        should_stop: asked before each training; something true leaves the rest.
        on_task: called with the number of trainings done, after each.

    Raises:
        ValueError: no task has two train pairs.
    """
    device = start.agent.copy_scale.device
    small = smaller_half([task for task in tasks if len(task.train) > 1])
    require(bool(small), "tasks", "at least one with two train pairs", [task.id for task in tasks])
    together = min(SIDE_BY_SIDE, len(small)) if device.type == "cuda" else 1
    train_on = train_side_by_side if device.type == "cuda" else train_one_by_one
    encoded: dict[str, tuple[Tensor, Tensor]] = {}
    began, before = time.monotonic(), start.tasks / most
    while not should_stop():
        share = start.tasks / most
        if seconds is not None:
            share = max(share, before + (1 - before) * (time.monotonic() - began) / seconds)
        if share >= 1:
            start.done = True
            return
        chosen = [draw(small, start.tasks + k, seed) for k in range(min(together, most - start.tasks))]
        for task in (one.task for one in chosen):
            if task.id not in encoded:
                encoded[task.id] = encode_task(planner, task, INNER.symmetries)
        start.move(train_on(start.agent, chosen, encoded), share)
        on_task(start.tasks)


def smaller_half(tasks: Sequence[Task]) -> list[Task]:
    """The half of the tasks whose train pairs need the smaller canvases, in order of size: more can be trained on."""
    by_size = sorted(tasks, key=lambda task: (max(canvas_of_pairs(task)), task.id))
    return by_size[: (len(by_size) + 1) // 2]


def canvas_of_pairs(task: Task) -> tuple[int, int]:
    """The canvas that a task's train pairs need."""
    return canvas_of([grid.shape for pair in task.train for grid in (pair.input, pair.output)])  # type: ignore[union-attr]


def draw(tasks: Sequence[Task], number: int, seed: int) -> Drawn:
    """What to train on in the training of this number, from 0: all tasks in random order, then all again."""
    turn, place = divmod(number, len(tasks))
    task = tasks[np.random.default_rng([seed, turn]).permutation(len(tasks))[place]]
    rng = np.random.default_rng([seed, turn, place])
    return Drawn(task, int(rng.integers(len(task.train))), int(rng.integers(2**31)))


def train_one_by_one(agent: GridAgent, chosen: Sequence[Drawn], encoded: dict[str, tuple[Tensor, Tensor]]) -> Trained:
    """Train a copy of the agent on each task: what a CPU does."""
    weights, gradients, losses = [], [], []
    for one in chosen:
        model = adapt_agent(agent, encoded[one.task.id], one.rest, replace(INNER, seed=one.seed)).planner
        batch = one.asking().batch()
        step_weight = step_weights(agent.steps, INNER.early_step_weight)
        plan, sizes = model(batch)
        loss = plan_loss(plan, sizes, batch, step_weight, 0.0 if size_rule(one.rest) else INNER.size_weight)
        model.zero_grad()
        loss.backward()
        norms = GroupGradNorm({"task": model.parameters()})
        norms.clip_(norms.measure(), INNER.clip)
        named = dict(model.agent.named_parameters())
        weights.append({name: p.detach() for name, p in named.items()})
        gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()})
        losses.append(loss.item())
    return Trained(means(weights), means(gradients), losses)


def train_side_by_side(agent: GridAgent, chosen: Sequence[Drawn], encoded: dict[str, tuple[Tensor, Tensor]]) -> Trained:
    """The same with all tasks at once: what a GPU does. The seed of the first is that of all."""
    rests, device = [one.rest for one in chosen], agent.copy_scale.device
    settings = replace(INNER, seed=chosen[0].seed)
    stacked = adapt_many(agent, [encoded[one.task.id] for one in chosen], rests, settings, capture=False).stacked
    table = ViewTable([one.asked for one in chosen], INNER, device)
    batch = table.examples(torch.from_numpy(table.drawn([one.asking() for one in chosen])).to(device))
    step_weight = step_weights(agent.steps, INNER.early_step_weight).to(device)
    size_weight = torch.tensor([0.0 if size_rule(task) else INNER.size_weight for task in rests], device=device)
    groups = stacked.task_parameters()
    plan, sizes = stacked(batch)
    loss, own = stacked_loss(plan, sizes, batch, step_weight, size_weight)
    loss.backward()
    norms = GroupGradNorm(groups)
    norms.clip_(norms.measure(), INNER.clip)
    names = [name for name, _ in agent.named_parameters()]
    weights, gradients = stacked.weights(), stacked.gradients()
    return Trained(
        {name: weights[f"agent.{name}"].detach().mean(0) for name in names},
        {name: gradients[f"agent.{name}"].mean(0) for name in names},
        own.tolist(),
    )


def with_agent(planner: QwenPlanner, agent: GridAgent) -> QwenPlanner:
    """The same planner with another agent; Qwen and all else is shared with it."""
    lines_agent(planner)
    other = copy.copy(planner)
    other._modules = {**planner._modules, "agent": agent}
    return other


def means(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each name's tensors."""
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}


def mean_of(values: Sequence[float]) -> float:
    """Their mean; nan of none."""
    return float(np.mean(values)) if values else float("nan")
