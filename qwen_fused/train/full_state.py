"""States of model and optimizer as whole tensors, however they lie in the processes that train.

So there is one format of a checkpoint: a run goes on in any number of processes, sharded or not, whatever it was saved
from. Every process reads the same file. (torch.distributed.checkpoint would write a folder per checkpoint, with a
pickle in it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def full_state(value: Any) -> Any:
    """A state with every sharded tensor put together, on every process. A collective."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: full_state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [full_state(item) for item in value]
    return value


def shard_state(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `full_state` for named tensors: each is cut as the tensor of that name in `like` is."""
    return {name: _shard(value, like.get(name)) for name, value in state.items()}


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `full_state` for an optimizer's state: what has its parameter's shape is cut as that is."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {name: _shard(value, held[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _shard(value: Any, like: Any) -> Any:
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process has read the same file: nothing needs to be sent
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
