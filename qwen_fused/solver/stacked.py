"""The planners of many tasks as one module: every parameter is a stack [K, ...] of K tasks.

`torch.func` runs the planner over the stack, and one `efe_loss` scores every episode of every task. Parameters that
are stepped alike lie side by side in one tensor: a task's gradient is then a few rows, and a step a few launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.planner.agent import Cells, GridAgent
from qwen_fused.solver.examples import Examples
from qwen_fused.solver.task_optimizer import MATRICES
from qwen_fused.solver.task_planner import CROSS_ENTROPY, TaskPlanner

Named = list[tuple[str, torch.Size]]


class StackedPlanner(nn.Module):
    """The planners of K tasks, all of one shape.

    Args:
        agent: what every task starts from; copied.
        prompts: [K, V, D], as a `TaskPlanner` takes them.
        demo_sizes: [K, V, 4].
        muon: whether the recurrence's matrices are Muon's: they then have stacks of their own.
    """

    prompts: Tensor
    demo_sizes: Tensor

    def __init__(self, agent: GridAgent, prompts: Tensor, demo_sizes: Tensor, *, muon: bool = True):
        super().__init__()
        body = TaskPlanner(agent, prompts[0], demo_sizes[0])
        named = [(name, p.detach()) for name, p in body.named_parameters()]
        matrices = [(name, p) for name, p in named if muon and name.endswith(MATRICES)]
        rest = [(name, p) for name, p in named if not (muon and name.endswith(MATRICES))]
        # the code that runs, in a list so that its own parameters, which are never used, are not this module's
        self.body = [body]
        flat = [[(n, p) for n, p in rest if p.dim() > 1], [(n, p) for n, p in rest if p.dim() <= 1]]
        self.parts: list[Named] = [[(name, p.shape) for name, p in part] for part in flat]
        self.parts += [[(name, p.shape)] for name, p in matrices]
        rows = [torch.cat([p.flatten() for _, p in part]) for part in flat] + [p for _, p in matrices]
        stacks = [row.expand(len(prompts), *row.shape).clone() for row in rows]
        self.decays, self.stays = nn.Parameter(stacks[0]), nn.Parameter(stacks[1])
        self.matrices = nn.ParameterList(stacks[2:])
        self.register_buffer("prompts", prompts.clone())
        self.register_buffer("demo_sizes", demo_sizes.clone())

    @property
    def tasks(self) -> int:
        """K."""
        return len(self.prompts)

    @property
    def stacks(self) -> list[nn.Parameter]:
        """What is trained: [K, n] with weight decay, [K, n] without, and [K, rows, columns] of each of Muon's."""
        return [self.decays, self.stays, *self.matrices]

    def weights(self) -> dict[str, Tensor]:
        """Every parameter of the planner by name, as a stack [K, ...]."""
        return self.named(self.stacks)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each, where all stacks have one."""
        return self.named([stack.grad for stack in self.stacks])  # type: ignore[misc]

    def named(self, stacks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors of the shape of `stacks`, cut into the planner's parameters by name."""
        found = {}
        for stack, part in zip(stacks, self.parts, strict=True):
            pieces = stack.flatten(1).split([math.prod(shape) for _, shape in part], 1)
            for (name, shape), piece in zip(part, pieces, strict=True):
                found[name] = piece.reshape(len(piece), *shape)
        return found

    def forward(self, batch: Examples, readouts: int | None = None) -> tuple[Tensor, Tensor]:
        """Plan logits [K, B, T, C, H, W] and size logits [K, B, 2, S] of K*B episodes, task by task."""

        def one(weights: dict[str, Tensor], cells: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor]:
            inputs, alive, copies = cells
            symmetry, query_size, size = others
            episodes = Examples(Cells(inputs, alive, copies), symmetry, query_size, size, None)
            return functional_call(self.body[0], weights, (episodes, readouts))

        cells = [batch.cells.inputs, batch.cells.alive, batch.cells.copies]
        others = [batch.symmetry, batch.query_size, batch.size]
        weights = {**self.weights(), "prompts": self.prompts, "demo_sizes": self.demo_sizes}
        by_task = [[x.unflatten(0, (self.tasks, -1)) for x in part] for part in (cells, others)]
        return vmap(one)(weights, *by_task)

    def task_parameters(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Per task its rows of every stack, whose gradient is the rows of the stack's gradient."""
        for stack in self.stacks:
            stack.grad = torch.zeros_like(stack)
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        for number in range(self.tasks):
            group = groups[f"task {number}"] = []
            for place, stack in enumerate(self.stacks):
                row = stack.detach()[number]
                row.grad = stack.grad[number]  # type: ignore[index]
                group.append((f"stack {place}", row))
        return groups

    @torch.no_grad()
    def unstacked(self, number: int) -> TaskPlanner:
        """The planner of one task.

        Args:
            number: which, from 0.
        """
        model = TaskPlanner(self.body[0].agent, self.prompts[number], self.demo_sizes[number])
        weights = self.weights()
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][number])
        return model


def stacked_loss(
    plan: Tensor, sizes: Tensor, batch: Examples, step_weight: Tensor, size_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum over tasks of `plan_loss`, with one `efe_loss` for the cells of all episodes; and each task's own [K].

    Args:
        plan: [K, B, T, C, H, W] logits.
        sizes: [K, B, 2, S] logits.
        batch: K*B episodes with targets, task by task.
        step_weight: [T].
        size_weight: [K].
    """
    assert batch.target is not None
    tasks = len(plan)
    cells = efe_loss(plan.flatten(0, 1), batch.target, step_weight=step_weight, weights=CROSS_ENTROPY, hard_mode="none")
    size = F.cross_entropy(sizes.flatten(0, 2), (batch.size - 1).flatten(), reduction="none").view(tasks, -1).mean(1)
    size = 2 * size_weight * size
    own = cells.terms["ce"].view(tasks, -1).mean(1) + size.detach()
    # a mean over tasks with equally many episodes each
    return tasks * cells.loss + size.sum(), own


def stack_prompts(encoded: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts [K, V, D] and sizes [K, V, 4] of what `encode_task` made of K tasks."""
    prompts, sizes = zip(*encoded, strict=True)
    return torch.stack(prompts).to(device), torch.stack(sizes).to(device)
