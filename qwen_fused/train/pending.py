"""A batch that the device may still be at: its numbers are on their way to the host while the next one is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_fused.norms.stats import PendingStats
from qwen_fused.planner.model import StepOutput

# what is logged of a step, in the order in which it travels
SCALARS = (
    "loss", "efe", "size_loss", "policy_loss", "reward", "prompt_grad", "mask_ratio", "accuracy", "solved",
    "size_accuracy", "truncated",
)  # fmt: skip


@dataclass
class PendingBatch:
    """What is known of a batch before the device has finished it; `Trainer.read` waits for the rest."""

    step: int
    epoch: int
    episodes: int
    flushed: bool  # whether Qwen had its gradient
    rates: dict[str, float]
    values: Tensor  # [len(SCALARS)] on the host, whole once `stats` is
    stats: PendingStats
    seconds: float = 1.0  # that the batch took, for the loop to set


def stack_scalars(out: StepOutput, prompt_grad: Tensor) -> Tensor:
    """SCALARS of a step as one tensor [len(SCALARS)] float32, so that they travel together."""
    efe = out.score.efe
    # a number is filled in on the device: a copy would have to wait for it
    truncated = out.truncated
    if not isinstance(truncated, Tensor):
        truncated = torch.full_like(out.loss, truncated)
    values = {
        "loss": out.loss,
        "efe": efe.loss,
        "size_loss": out.score.size,
        "policy_loss": out.policy.loss,
        "reward": out.reward.mean(),
        "prompt_grad": prompt_grad,
        "mask_ratio": efe.hard_ratio.mean(),
        "accuracy": efe.accuracy.mean(),
        "solved": efe.solved.float().mean(),
        "size_accuracy": out.score.size_accuracy,
        "truncated": truncated,
    }
    return torch.stack([values[name].detach().float() for name in SCALARS])
