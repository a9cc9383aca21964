"""Noise that is added to a gradient: drawn at other sizes, to see whether it is no more than added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof import kinds, modes
from qwen_fused.proof.real_parts import inner

# draws of noise around zero, and of numbers that a tensor's own are replaced by
NORMAL = ("randn", "randn_like", "normal", "normal_")
# relative difference between two differences, squared, that is rounding
ROUNDING = 1e-6


@contextmanager
def scaled_noise(factor: float) -> Iterator[None]:
    """Multiply all normal noise that is drawn meanwhile, and draw the same noise each time."""
    generator = torch.Generator().manual_seed(0)

    def call(func: Any, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        if kinds.name_of(func) not in NORMAL:
            return out
        noise = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        mean, deviation = _asked_for(kinds.name_of(func), args, kwargs)
        with torch.no_grad():
            return out.copy_(mean + factor * deviation * noise)

    with torch.random.fork_rng(devices=[]), modes.FunctionMode(call):
        yield


def _asked_for(name: str, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """Mean and deviation that a draw was asked for."""
    if not name.startswith("normal"):
        return 0.0, 1.0
    first = 1 if name == "normal_" else 0
    mean, deviation = args[first : first + 1], args[first + 1 : first + 2]
    return mean[0] if mean else kwargs.get("mean", 0.0), deviation[0] if deviation else kwargs.get("std", 1.0)


def is_added(runs: Sequence[Tensor]) -> bool:
    """Whether a gradient with noise of size 0, 1 and 2 is a sum of something and the noise."""
    none, once, twice = runs
    step, again = once - none, twice - once
    size = inner(step, step)
    return size > 0 and inner(again - step, again - step) <= ROUNDING * size
