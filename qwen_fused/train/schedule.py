"""Which parameters learn at which rate: the optimizer's groups, and how their rates rise and fall over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qwen_fused.config import TrainConfig


def optimizer_groups(
    groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]], config: TrainConfig
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each with its peak rate; vectors and scalars are not decayed.

    Args:
        groups: named parameters by group, as `QwenPlanner.groups` has them.
        config: of the run.
    """
    peak = {
        "qwen": config.qwen_lr,
        "agent": config.agent_lr,
        "policy": config.policy_lr,
        "objective": config.agent_lr / 2,
    }
    found = []
    for name, members in groups.items():
        for decay in (True, False):
            chosen = [p for _, p in members if (p.ndim >= 2) == decay]
            weight_decay = config.weight_decay if decay else 0.0
            if chosen:
                found.append({"params": chosen, "name": name, "peak": peak[name], "weight_decay": weight_decay})
    return found


def learning_rate(peak: float, step: int, total: int, config: TrainConfig) -> float:
    """The rate of one batch: linear warm-up, times a linear decay to `final_lr` of the peak at batch `total`."""
    warm = min(1.0, (step + 1) / max(config.warmup_batches, 1))
    left = 1.0 - (1.0 - config.final_lr) * step / max(total, 1)
    return peak * warm * left
