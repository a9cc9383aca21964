"""The autograd graph behind a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Every autograd node behind the tensor, each once, the tensor's own first."""
    if tensor.grad_fn is None:
        return
    seen, stack = {tensor.grad_fn}, [tensor.grad_fn]
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """Leaves that the autograd graph behind the tensor would accumulate gradients into."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return [node.variable for node in graph_nodes(tensor) if type(node).__name__ == "AccumulateGrad"]
