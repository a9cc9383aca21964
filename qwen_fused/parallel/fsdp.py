"""Qwen's weights sharded over the processes (FSDP2), gathered once per prompt window.

Every process holds 1/n of Qwen's weights, gradients and optimizer state. Inside a window the weights stand still, so
they are gathered once, at its first batch, and stay; processes may then send any number of prompts through Qwen, each
at its own pace. `flush` adds their gradients up locally, exchanges the sums in one last pass, and shards again. Beside
the shards, one whole copy of weights and gradient must fit for that time: what is saved is the optimizer's state and
its masters, two thirds to three quarters of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class ShardedQwen:
    """Shards a backbone in place, before its parameters go to an optimizer.

    Args:
        backbone: on its device, every parameter trainable and of one type.
        device: where it is.
        size: processes.
    """

    def __init__(self, backbone: nn.Module, device: torch.device, size: int):
        self.backbone, self.device = backbone, device
        mesh = init_device_mesh(device.type, (size,))
        for module in backbone.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module, mesh=mesh, reshard_after_forward=False)
        fully_shard(backbone, mesh=mesh, reshard_after_forward=False)
        # what an optimizer changes; the whole weights come and go, and do not show whether it did
        with torch.no_grad():
            self.shards = [cast(DTensor, parameter).to_local() for parameter in backbone.parameters()]
        self.modules = [module for module in backbone.modules() if isinstance(module, FSDPModule)]
        for module in self.modules:
            # a loss is scaled by its process's share: gradients are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            # as plain sums, which every backend has
            module.set_force_sum_reduction_for_comms(True)

    def gather(self) -> None:
        """Have the whole weights here, until the next flush; nothing to do where they are already. A collective."""
        for module in self.modules:
            module.unshard()

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Inside, gradients are added up locally; at the end they are summed over the processes. A collective."""
        self._exchange(False)
        yield
        self._exchange(True)
        # processes have sent unlike numbers of prompts; this token, with a gradient of 0, is the one pass of them all
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        (0 * self.backbone(input_ids=token, use_cache=False).last_hidden_state.sum()).backward()

    def _exchange(self, now: bool) -> None:
        # the first is the backbone, which tells the others
        self.modules[0].set_requires_gradient_sync(now)
        self.modules[0].set_reshard_after_backward(now)
