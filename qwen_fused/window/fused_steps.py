"""The writes of fused optimizers, seen: a window refuses weights that moved inside it by their version counters."""

from __future__ import annotations

from functools import cache

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@cache
def watch_fused_steps() -> None:
    """From now on, count a fused optimizer's step as the write to its parameters that it is: torch does not."""

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            if group.get("fused") and not getattr(optimizer, "counts_writes", False):
                torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)
