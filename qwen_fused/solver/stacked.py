"""Many tasks side by side, each with weights of its own: what `adapt` does one by one, in one graph.

Every parameter is a stack [K, ...] of K tasks; `torch.func` runs the planner over the stack, one `efe_loss` scores
every episode of every task, and `GroupGradNorm` measures and clips each task by itself, in one read of all gradients.
The optimizer and the moving average serve a stack as they serve a task. For devices that
one task cannot fill; on a CPU one by one is faster, and the two are equal up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from qwen_fused.arc.episodes import Task
from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.planner.agent import Cells
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver.adapt import Adapted, Average, Schedule, own_accuracy, step_weights
from qwen_fused.solver.examples import Examples, TrainingSet, examples, task_rng
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.sizes import size_rule
from qwen_fused.solver.task_optimizer import TaskOptimizer
from qwen_fused.solver.task_planner import CROSS_ENTROPY, TaskPlanner, encode_task, lines_agent


class StackedPlanner(nn.Module):
    """The planners of K tasks as one module of stacked parameters.

    Args:
        models: one per task, of the same shape; copied.
    """

    def __init__(self, models: Sequence[TaskPlanner]):
        super().__init__()
        self.names = [name for name, _ in models[0].named_parameters()]
        columns = zip(*(model.parameters() for model in models), strict=True)
        self.stacks = nn.ParameterList([torch.stack([p.detach() for p in column]) for column in columns])
        self.prompts = torch.stack([model.prompts for model in models])
        self.demo_sizes = torch.stack([model.demo_sizes for model in models])
        # the code that runs; its own weights are never used
        self.body = [models[0]]

    def forward(self, batches: Sequence[Examples]) -> tuple[Tensor, Tensor]:
        """Plan logits [K, B, T, C, H, W] and size logits [K, B, 2, S] of one batch per task, all on one canvas."""
        cells = [
            torch.stack([getattr(batch.cells, name) for batch in batches]) for name in ("inputs", "alive", "copies")
        ]
        names = ("symmetry", "query_size", "size")
        others = [torch.stack([getattr(batch, name) for batch in batches]) for name in names]

        def one(weights: dict[str, Tensor], cells: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor]:
            inputs, alive, copies = cells
            symmetry, query_size, size = others
            batch = Examples(Cells(inputs, alive, copies), symmetry, query_size, size, None)
            return functional_call(self.body[0], weights, (batch,))

        weights = dict(zip(self.names, self.stacks, strict=True))
        return vmap(one)({**weights, "prompts": self.prompts, "demo_sizes": self.demo_sizes}, cells, others)

    def task_parameters(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Per task its slice of every stack, whose gradient is the slice of the stack's gradient."""
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        for stack in self.stacks:
            stack.grad = torch.zeros_like(stack)
        for number in range(len(self.prompts)):
            group = groups[f"task {number}"] = []
            for name, stack in zip(self.names, self.stacks, strict=True):
                part = stack.detach()[number]
                part.grad = stack.grad[number]
                group.append((name, part))
        return groups

    @torch.no_grad()
    def write_to(self, models: Sequence[TaskPlanner]) -> None:
        """Give every task's planner its weights."""
        for number, model in enumerate(models):
            for parameter, stack in zip(model.parameters(), self.stacks, strict=True):
                parameter.copy_(stack[number])


def adapt_many(
    planner: QwenPlanner,
    tasks: Sequence[Task],
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> list[Adapted]:
    """Train a copy of the planner on each task's demonstrations, all at once.

    Args:
        planner, settings, deadline: as `adapt` takes them; `task_seconds` is for all the tasks together.
        tasks: at least one. Their grids share a canvas: put tasks of like sizes together.
        on_step: called after every step with its number, from 1, and the tasks' losses [K].
    """
    started = time.monotonic()
    ends = [t for t in (deadline, started + settings.task_seconds if settings.task_seconds else None) if t is not None]
    models = [TaskPlanner(lines_agent(planner), *encode_task(planner, task, settings.symmetries)) for task in tasks]
    training = [TrainingSet(task, settings, task_rng(settings, task.id)) for task in tasks]
    stacked = StackedPlanner(models)
    schedule = Schedule(settings, started, min(ends) if ends else None)
    optimizer = TaskOptimizer(list(zip(stacked.names, stacked.stacks, strict=True)), settings, axes=1)
    norms = GroupGradNorm(stacked.task_parameters())
    average = Average(stacked, settings.average)
    device = stacked.prompts.device
    step_weight = step_weights(models[0].agent.steps, settings.early_step_weight).to(device)
    size_weight = torch.tensor([0.0 if size_rule(task) else settings.size_weight for task in tasks], device=device)
    losses: list[Tensor] = []
    while (share := schedule.at(len(losses))) is not None:
        batches = side_by_side(training, device)
        plan, sizes = stacked(batches)
        loss, own = stacked_loss(plan, sizes, batches, step_weight, size_weight)
        loss.backward()
        norms.clip_(norms.measure(), settings.clip)
        optimizer.step(share)
        # in place: the tasks' gradients are views of these
        optimizer.zero_grad(set_to_none=False)
        average.update(len(losses))
        losses.append(own)
        if on_step:
            on_step(len(losses), losses[-1])
    average.swap_in()
    stacked.write_to(models)
    seconds = time.monotonic() - started
    curves = torch.stack(losses, 1).tolist() if losses else [[]] * len(tasks)
    return [
        Adapted(model, len(curve), seconds, tuple(curve), *own_accuracy(model, task))
        for model, task, curve in zip(models, tasks, curves, strict=True)
    ]


def side_by_side(training: Sequence[TrainingSet], device: torch.device) -> list[Examples]:
    """The next batch of every task, all on the smallest canvas that holds them."""
    drawn = [one.draw() for one in training]
    shapes = [grid.shape for queries, answers, _ in drawn for grid in queries + answers]
    canvas = max(h for h, _ in shapes), max(w for _, w in shapes)
    return [
        examples(queries, [answer.shape for answer in answers], seen, answers, canvas).to(device)
        for queries, answers, seen in drawn
    ]


def stacked_loss(
    plan: Tensor, sizes: Tensor, batches: Sequence[Examples], step_weight: Tensor, size_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum over tasks of `plan_loss`, with one `efe_loss` for the cells of all episodes; and each task's own [K].

    Args:
        plan: [K, B, T, C, H, W] logits.
        sizes: [K, B, 2, S] logits.
        batches: K, with targets.
        step_weight: [T].
        size_weight: [K].
    """
    tasks = len(batches)
    target = torch.cat([batch.target for batch in batches])  # type: ignore[misc]
    cells = efe_loss(plan.flatten(0, 1), target, step_weight=step_weight, weights=CROSS_ENTROPY, hard_mode="none")
    sides = torch.stack([batch.size for batch in batches]) - 1
    size = F.cross_entropy(sizes.flatten(0, 2), sides.flatten(), reduction="none").view(tasks, -1).mean(1)
    size = 2 * size_weight * size
    own = cells.terms["ce"].view(tasks, -1).mean(1) + size.detach()
    # a mean over tasks with equally many episodes each
    return tasks * cells.loss + size.sum(), own
