"""What gradients are clipped to: a bound per group, as numbers or on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

Bound = float | Tensor


def read_bounds(
    max_norm: Bound | Mapping[str, Bound], groups: tuple[str, ...], values: Tensor
) -> tuple[list[float], Tensor | None]:
    """A bound for each of the G groups.

    Args:
        max_norm: as `GroupGradNorm.clip_` takes it.
        groups: G names.
        values: what was measured, [3, R]: where a tensor has to be.

    Returns:
        G numbers; or none, and a float64 tensor [G], where any bound is a tensor.

    Raises:
        ValueError: a bound is no bound, or for a group that there is not.
    """
    count = len(groups)
    if isinstance(max_norm, Tensor):
        return [], _fit(max_norm, values, count).expand(count)
    if not isinstance(max_norm, Mapping):
        number = _number(max_norm, max_norm)
        if torch.compiler.is_compiling():
            return [], on_device(number, values).expand(count)
        return [number] * count, None
    unknown = set(max_norm) - set(groups)
    if unknown:
        raise ValueError(f"max_norm must name groups among {list(groups)}, got {sorted(map(str, unknown))}")
    bounds = [max_norm.get(group, math.inf) for group in groups]
    if not torch.compiler.is_compiling() and not any(isinstance(bound, Tensor) for bound in bounds):
        return [_number(bound, max_norm) for bound in bounds], None
    made = [
        _fit(bound, values, 1).reshape(()) if isinstance(bound, Tensor) else on_device(_number(bound, max_norm), values)
        for bound in bounds
    ]
    return [], torch.stack(made)


def on_device(number: float, like: Tensor) -> Tensor:
    """A number as a 0-d float64 tensor; by a product, which torch.compile keeps for any number it is called with."""
    return like.new_ones((), dtype=torch.float64) * number


def _number(bound: object, max_norm: object) -> float:
    if not isinstance(bound, Real) or not float(bound) >= 0:
        raise ValueError(f"max_norm must be a number of at least 0, or such a number per group, got {max_norm!r}")
    return float(bound)


def _fit(bound: Tensor, values: Tensor, count: int) -> Tensor:
    """The bound as float64: [count], or [1] for all of them."""
    if bound.numel() != 1 and bound.shape != (count,):
        raise ValueError(f"max_norm must have one element, or one for each group, got {tuple(bound.shape)}")
    if bound.device != values.device:
        raise ValueError(f"max_norm must be on {values.device} like the gradients, got {bound.device}")
    if bound.is_complex() or bound.dtype == torch.bool:
        raise ValueError(f"max_norm must hold real numbers, got {bound.dtype}")
    return bound.detach().reshape(-1).double()
