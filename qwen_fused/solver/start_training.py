"""One training on a task for a start: a copy of it is trained on all pairs but one, and asked for that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.tasks import Task
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.adapt import adapt_agent, step_weights
from qwen_fused.solver.adapt_many import adapt_many
from qwen_fused.solver.examples import TrainingSet
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.stacked import stacked_loss
from qwen_fused.solver.task_planner import plan_loss
from qwen_fused.solver.view_table import ViewTable

# views of the pair left out
ASKED = 8


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

    def asking(self, inner: SolveSettings) -> TrainingSet:
        """Views of the pair left out, recoloured as the others are."""
        rng = np.random.default_rng([self.seed, 1])
        return TrainingSet(self.asked, replace(inner, batch=ASKED), rng, colors_of=self.rest)


def train_one(agent: GridAgent, one: Drawn, encoded: tuple[Tensor, Tensor], inner: SolveSettings) -> Trained:
    """Train a copy of the agent on a task.

    Args:
        agent: the start; it stays as it is.
        one: the task.
        encoded: what `encode_task` made of it.
        inner: what is done for it.
    """
    model = adapt_agent(agent, encoded, one.rest, replace(inner, seed=one.seed)).planner
    batch = one.asking(inner).batch()
    plan, sizes = model(batch)
    size_weight = 0.0 if size_rule(one.rest) else inner.size_weight
    loss = plan_loss(plan, sizes, batch, step_weights(agent.steps, inner.early_step_weight), size_weight)
    model.zero_grad()
    loss.backward()
    norms = GroupGradNorm({"task": model.parameters()})
    norms.clip_(norms.measure(), inner.clip)
    named = dict(model.agent.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return Trained({name: p.detach() for name, p in named.items()}, gradients, [loss.item()])


def train_side_by_side(
    agent: GridAgent, chosen: Sequence[Drawn], encoded: Sequence[tuple[Tensor, Tensor]], inner: SolveSettings
) -> Trained:
    """The same with several tasks at once: what a GPU does. The seed of the first is that of all."""
    rests, device = [one.rest for one in chosen], agent.copy_scale.device
    settings = replace(inner, seed=chosen[0].seed)
    stacked = adapt_many(agent, encoded, rests, settings, capture=False).stacked
    table = ViewTable([one.asked for one in chosen], settings, device)
    drawn = table.drawn([one.asking(inner) for one in chosen])
    batch = table.examples(torch.from_numpy(drawn).to(device))
    step_weight = step_weights(agent.steps, inner.early_step_weight).to(device)
    size_weight = torch.tensor([0.0 if size_rule(task) else inner.size_weight for task in rests], device=device)
    groups = stacked.task_parameters()
    plan, sizes = stacked(batch)
    loss, own = stacked_loss(plan, sizes, batch, step_weight, size_weight)
    loss.backward()
    norms = GroupGradNorm(groups)
    norms.clip_(norms.measure(), inner.clip)
    names = [name for name, _ in agent.named_parameters()]
    weights, gradients = stacked.weights(), stacked.gradients()
    return Trained(
        {name: weights[f"agent.{name}"].detach().mean(0) for name in names},
        {name: gradients[f"agent.{name}"].mean(0) for name in names},
        own.tolist(),
    )


def mean_of_all(found: Sequence[Trained]) -> Trained:
    """What trainings on one task each lead to together: the same in the same order, wherever they were done."""
    weights, gradients = means([one.weights for one in found]), means([one.gradients for one in found])
    return Trained(weights, gradients, [loss for one in found for loss in one.losses])


def means(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each name's tensors."""
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}
