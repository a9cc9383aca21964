"""Everything that a run needs to go on: whole tensors, however they lie in the processes that train.

So there is one format: a run goes on in any number of processes, sharded or not, whatever it was saved from. Every
process reads the same file. (torch.distributed.checkpoint would write a folder per checkpoint, with a pickle in it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_fused.random_state import rng_state, set_rng_state
from qwen_fused.window_parts import gather_window, share_window

if TYPE_CHECKING:
    from qwen_fused.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything a bitwise continuation needs; the data order follows from the step alone.

    The same for any number of processes, each of which must ask for it.
    """
    return {
        "model": weights_of(trainer),
        "optimizer": whole(trainer.optimizer.state_dict()),
        "scaler": trainer.scaler.state_dict(),
        "progress": dataclasses.asdict(trainer.progress),
        "window": gather_window(trainer.window, _shown(trainer), trainer.ranks),
        "monitor": trainer.monitor.state_dict(),
        "rng": rng_state(trainer.device),
        "origin": trainer.origin,
    }


def load_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Inverse of `state_of`, into a run of any number of processes."""
    trainer.model.load_state_dict(spread(state["model"], trainer.model.state_dict()))
    # rates and decay are the configuration's: the optimizer would take them from the checkpoint
    given = [{name: group[name] for name in ("peak", "weight_decay")} for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(spread_optimizer(state["optimizer"], trainer.optimizer))
    for group, settings in zip(trainer.optimizer.param_groups, given, strict=True):
        group.update(settings)
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.progress = type(trainer.progress)(**state["progress"])
    trainer.monitor.load_state_dict(state["monitor"])
    window, keys = share_window(state["window"], _shown(trainer), trainer.ranks)
    trainer.window.load_state_dict(window, keys, trainer.device)
    set_rng_state(state["rng"], trainer.device)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """The model's state; every process must ask for it."""
    return whole(trainer.model.state_dict())


def _shown(trainer: Trainer) -> list[list[Hashable]]:
    """The keys of the prompt window's batches so far."""
    epoch, index = divmod(trainer.progress.step, trainer.sampler.batches_per_epoch())
    start = trainer.sampler.window_start(index)
    batches = [trainer.sampler.batch(epoch, k) for k in range(start, index)]
    return [[episode.demonstrations for episode in batch] for batch in batches]


def whole(value: Any) -> Any:
    """A state with every sharded tensor put together, on every process. A collective."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    return value


def spread(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `whole` for named tensors: each is cut as the tensor of that name in `like` is."""
    return {name: _cut(value, like.get(name)) for name, value in state.items()}


def spread_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole` for an optimizer's state: what has its parameter's shape is cut as that is."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {name: _cut(value, held[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _cut(value: Any, like: Any) -> Any:
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process has read the same file: nothing needs to be sent
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
