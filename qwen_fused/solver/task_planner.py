"""The planner of one task: a copy of the agent, the task's prompts, and what the task adds to them.

The forward plan alone: no policy, no backward plan, no Qwen. Qwen has read the demonstrations once; what each symmetry
adds to the prompt is learned with the task, so that a planner can tell up from down where that matters.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_fused.arc.episodes import MAX_SIDE, Task
from qwen_fused.arc.features import FEATURES, SIZE_FEATURES
from qwen_fused.arc.symmetry import swaps_sides
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss
from qwen_fused.planner.agent import GridAgent
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.solver.examples import Examples

if TYPE_CHECKING:
    from qwen_fused.planner.model import QwenPlanner

# at test time nothing else of the loss pays
CROSS_ENTROPY = EFEWeights(risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)


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
        sizes = self.agent.size_head(prompt, batch.query_size, self.demo_sizes[batch.symmetry])
        return self.agent.plan(batch.cells, prompt, readouts), sizes


def lines_agent(planner: QwenPlanner) -> GridAgent:
    """The agent of a planner that can be trained on a task.

    Raises:
        ValueError: it is that of runs before 0.3.
    """
    if not isinstance(planner.agent, GridAgent):
        raise ValueError("training on a task needs a run with --agent lines, got one with conv, as runs before 0.3 are")
    return planner.agent


def encode_task(planner: QwenPlanner, task: Task, symmetries: int) -> tuple[Tensor, Tensor]:
    """What Qwen makes of a task, once: its prompt [V, D] and the demonstrations' mean sizes [V, 4], for each symmetry.

    The prompt is the same through every symmetry: what differs between them is for the task to learn.
    """
    with evaluating(planner):
        encoded = planner.prompt([task.train])
    sizes = MAX_SIDE * torch.stack([encoded.features[0, FEATURES.index(name)] for name in SIZE_FEATURES])
    turned = [sizes[[1, 0, 3, 2]] if swaps_sides(symmetry) else sizes for symmetry in range(symmetries)]
    return encoded.prompt.repeat(symmetries, 1), torch.stack(turned)


def plan_loss(plan: Tensor, sizes: Tensor, batch: Examples, step_weight: Tensor, size_weight: float) -> Tensor:
    """Mean loss of a batch: cross-entropy of every planning step, and of the answer's rows and columns.

    Args:
        plan: [B, T, C, H, W] logits.
        sizes: [B, 2, S] logits of (rows, columns) - 1.
        batch: with targets.
        step_weight: [T].
        size_weight: of the size loss. At 0 its weights still have a gradient, of 0, as they have beside other tasks.
    """
    assert batch.target is not None
    loss = efe_loss(plan, batch.target, step_weight=step_weight, weights=CROSS_ENTROPY, hard_mode="none").loss
    return loss + size_weight * 2 * F.cross_entropy(sizes.flatten(0, 1), (batch.size - 1).flatten())
