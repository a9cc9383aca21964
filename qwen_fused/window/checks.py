"""What a prompt window asks of its arguments and of what encode returns; a complaint names it, and what came."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_nodes

# what `PromptWindow.state_dict` holds
STATE = ("batches", "starts", "outputs", "gradient", "rng_cpu", "rng_cuda", "autocast")


def check_keys(keys: Any) -> None:
    """Refuse what is no list of keys: a string is one of letters, and a set has no order."""
    if not isinstance(keys, Collection) or isinstance(keys, (str, bytes, set, frozenset)):
        raise ValueError(f"keys must be a list of keys, got a {type(keys).__name__}")
    if len(keys) == 0:
        raise ValueError("keys must hold at least one key, got none")
    for bad in (key for key in keys if isinstance(key, Tensor) or not isinstance(key, Hashable)):
        raise ValueError(f"keys must be hashable and equal where they mean the same, got a {type(bad).__name__}")


def check_output(output: Any, n: int, before: torch.Size | None) -> None:
    """Refuse what is not n prompts of the shape that the window's prompts had before, which is None at the first."""
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != n:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"encode must return [{n}, D] or [{n}, K, D] for {n} keys, got {got}")
    if before is not None and output.shape[1:] != before:
        raise ValueError(
            f"encode must return prompts of one shape inside a window, got {tuple(before)}, then "
            f"{tuple(output.shape[1:])}"
        )


def check_graph(output: Tensor) -> None:
    """Refuse prompts that nothing can be sent back through."""
    if not output.requires_grad:
        raise RuntimeError(
            "encode gives prompts that require no grad, so that there is nothing to send the window's gradient to: its "
            "parameters are frozen, or flush() is under inference_mode"
        )


def check_statistics(output: Tensor) -> None:
    """Refuse an encode whose running statistics a second pass would count a second time."""
    if any(map(_updates_statistics, graph_nodes(output))):
        raise ValueError(
            "encode must change nothing where it runs twice, got batch norm that updates its running statistics: "
            "use mode='retain', or put encode into eval mode"
        )


def _updates_statistics(node: Any) -> bool:
    if "BatchNorm" not in type(node).__name__ or not getattr(node, "_saved_training", False):
        return False
    try:
        return node._saved_running_mean is not None
    except RuntimeError:
        # there, and written to since it was saved: by this very pass
        return True


def read_scale(scale: Any) -> float | Tensor:
    """The factor of `PromptWindow.flush`, a tensor of it 0-d and without a graph."""
    if isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_complex():
        return scale.detach().reshape(())
    if not isinstance(scale, Real):
        got = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"scale must be a number or a tensor of one element, got {got}")
    return float(scale)


def check_state(state: Mapping[str, Any], keys: int, size: int) -> int:
    """Refuse a state that is not whole, or is not of so many keys, or of more batches than a window has.

    Returns:
        How many prompts it holds.
    """
    missing = [name for name in STATE if name not in state]
    if missing:
        raise ValueError(f"state must be what a window's state_dict gave, got one without {', '.join(missing)}")
    count = sum(map(len, state["outputs"]))
    if keys != count:
        raise ValueError(f"keys must name the state's {count} prompts, got {keys} different keys")
    if state["batches"] > size:
        raise ValueError(f"size must be at least the state's {state['batches']} batches, got {size}")
    return count
