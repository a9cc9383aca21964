"""The planner of one task: a copy of the agent, the task's prompts, and what the task adds to them.

The forward plan alone: no policy, no backward plan, no Qwen. Qwen has read the demonstrations once, through each
symmetry; what the task adds to a symmetry's prompt is learned, so that a planner can tell up from down where that matters.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_fused.arc.episodes import MAX_SIDE, Task
from qwen_fused.arc.features import FEATURES
from qwen_fused.arc.symmetry import turn
from qwen_fused.loss.efe_loss import CE_ONLY, efe_loss
from qwen_fused.planner.agent import GridAgent
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.planner.model import SIZE_FEATURES, QwenPlanner
from qwen_fused.solver.examples import Examples


class TaskPlanner(nn.Module):
    """Plans for one task under its own prompts.

    Args:
        agent: what to start from; copied.
        prompts: [V, D], the task's prompt through each symmetry.
        demo_sizes: [V, 4], the demonstrations' mean rows in, columns in, rows out, columns out, through each symmetry.
    """

    prompts: Tensor
    demo_sizes: Tensor

    def __init__(self, agent: GridAgent, prompts: Tensor, demo_sizes: Tensor):
        super().__init__()
        self.agent = deepcopy(agent)
        self.offset = nn.Parameter(torch.zeros_like(prompts))
        self.register_buffer("prompts", prompts)
        self.register_buffer("demo_sizes", demo_sizes)

    def forward(self, batch: Examples, readouts: int | None = None) -> tuple[Tensor, Tensor]:
        """Plan logits [B, T, C, H, W] of the last `readouts` steps (all by default), and size logits [B, 2, S]."""
        prompt = (self.prompts + self.offset)[batch.symmetry]
        agent = self.agent
        state = agent.embed(batch.inputs, batch.alive)
        scale, shift = agent.core.condition(prompt)
        first = agent.steps - (readouts or agent.steps)
        logits = []
        for step in range(agent.steps):
            state = agent.core(state, batch.alive, scale, shift)
            if step >= first:
                logits.append(agent.read(state, prompt, batch.copies))
        sizes = agent.size_head(prompt, batch.query_size, self.demo_sizes[batch.symmetry])
        return torch.stack(logits, 1), sizes


def encode_task(planner: QwenPlanner, task: Task, symmetries: int) -> tuple[Tensor, Tensor]:
    """Qwen's prompts [V, D] of the demonstrations through each symmetry, and their mean sizes [V, 4]."""
    turned = [
        tuple(replace(p, input=turn(p.input, s), output=turn(p.output, s)) for p in task.train)  # type: ignore[arg-type]
        for s in range(symmetries)
    ]
    with evaluating(planner):
        encoded = planner.prompt(turned)
    sizes = MAX_SIDE * torch.stack([encoded.features[:, FEATURES.index(name)] for name in SIZE_FEATURES], 1)
    return encoded.prompt, sizes


def plan_loss(plan: Tensor, sizes: Tensor, batch: Examples, step_weight: Tensor, size_weight: float) -> Tensor:
    """Mean loss of a batch: cross-entropy of every planning step, and of the answer's rows and columns.

    Args:
        plan: [B, T, C, H, W] logits.
        sizes: [B, 2, S] logits of (rows, columns) - 1.
        batch: with targets.
        step_weight: [T].
        size_weight: of the size loss; 0 leaves it out.
    """
    assert batch.target is not None
    loss = efe_loss(plan, batch.target, step_weight=step_weight, weights=CE_ONLY, hard_mode="none").loss
    if size_weight:
        loss = loss + size_weight * 2 * F.cross_entropy(sizes.flatten(0, 1), (batch.size - 1).flatten())
    return loss
