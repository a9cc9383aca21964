"""What a batch does to the planner, from its loss to the optimizer's step: the part of a step that can be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_fused.config import TrainConfig
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import GradStats
from qwen_fused.parallel.processes import Part, Ranks
from qwen_fused.planner.model import QwenPlanner, StepOutput
from qwen_fused.train.optimizer import MasterAdamW
from qwen_fused.train.pending import stack_scalars

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Backward:
    """What a batch's backward pass leaves on the device, besides gradients."""

    values: Tensor  # [len(SCALARS)]
    loss_scale: Tensor  # [], which the parameters' gradients still have


class PlannerStep:
    """Model, optimizer and what lies between them. Nothing here looks at a tensor's values on the host."""

    config: TrainConfig
    device: torch.device
    ranks: Ranks
    model: QwenPlanner
    groups: dict[str, list[tuple[str, nn.Parameter]]]
    optimizer: MasterAdamW
    norms: GroupGradNorm
    scaler: torch.amp.GradScaler

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        dtype = AUTOCAST_DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def after_backward(self, out: StepOutput, prompt_gradient: Tensor, target: Tensor, part: Part) -> Backward:
        """What is logged of a backward pass; the anchor hears of it."""
        loss_scale = self.loss_scale()
        prompt_grad = self.ranks.all_reduce_norm(prompt_gradient.float().norm() / loss_scale)
        self.model.objective.update_anchor(target, self.ranks.all_gather(out.score.efe.solved, part))
        return Backward(self.ranks.all_reduce(stack_scalars(out, prompt_grad) * part.weight), loss_scale)

    def backward(self, loss: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Send a loss back, scaled, as far as the window's leaves, which keep their gradients unscaled.

        Returns:
            The loss scale, which every other gradient still has.
        """
        self.scaler.scale(loss).backward()
        loss_scale = self.loss_scale()
        for leaf in pooled:
            if leaf.grad is not None:
                leaf.grad = unscaled(leaf.grad, loss_scale, self.ranks)
        return loss_scale

    def loss_scale(self) -> Tensor:
        """What losses are multiplied with before they are sent back, on the device."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def step(self) -> GradStats:
        """Unscale, measure, clip and step; a NaN or Inf leaves weights and optimizer as they are, without a sync."""
        self.scaler.unscale_(self.optimizer)
        stats = self.norms.measure()
        self.norms.clip_(stats, self.config.clip)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # fused AdamW reads it on the device and leaves everything alone where it is 1
            self.optimizer.found_inf = (stats.nonfinite.sum() > 0).float()
            self.optimizer.step()
        return stats


def unscaled(gradient: Tensor, loss_scale: Tensor, ranks: Ranks) -> Tensor:
    """A leaf's gradient without its batch's loss scale; a batch that overflowed leaves the window without a trace."""
    gradient = gradient / loss_scale
    return torch.where(ranks.all_reduce_and(gradient.isfinite().all()), gradient, torch.zeros_like(gradient))
