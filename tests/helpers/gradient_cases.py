"""Gradients for tests: every layout and magnitude, and 80-bit arithmetic to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

MAGNITUDES = {
    torch.float16: [1.0, 6e-8, 6e4],
    torch.bfloat16: [1.0, 1e-38, 1e38],
    torch.float32: [1.0, 1e-42, 1e-30, 1e-20, 1e30, 1e38],
    torch.float64: [1.0, 1e-310, 1e-200, 1e153, 1e200, 1e300],
}


def parameter(grad: torch.Tensor | None, like: torch.Tensor | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad if like is None else like))
    p.grad = grad
    return p


def exact_norm(grads: list[torch.Tensor], inv_scale: float = 1.0) -> float:
    """L2 norm in 80-bit floats, whose range no float64 square leaves."""
    total = np.longdouble(0)
    for grad in grads:
        total += np.square(grad.detach().cpu().double().numpy().astype(np.longdouble)).sum()
    return float(np.sqrt(total) * np.longdouble(abs(inv_scale)))


def exact_max(grads: list[torch.Tensor], inv_scale: float = 1.0) -> float:
    return max((grad.detach().double().abs().max().item() * inv_scale for grad in grads if grad.numel()), default=0.0)


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in memory as gradients may come."""
    n = values.numel()
    if layout == "transposed":
        return values.new_empty(3, n).copy_(values.expand(3, n)).t()
    if layout == "channels_last":
        return values.expand(2, 3, 1, n).contiguous(memory_format=torch.channels_last)
    if layout == "holes":
        return values.repeat_interleave(2)[::2]
    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values])[1:]
    if layout == "expanded":
        return values.expand(2, n)
    return values
