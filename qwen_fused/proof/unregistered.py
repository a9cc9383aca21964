"""What the loss depends on and trains, and what no module has registered or no optimizer holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.common.autograd_graph import graph_leaves
from qwen_fused.proof.ladder import Finding, name_some
from qwen_fused.proof.subject import Subject

_REGISTRIES = ("_parameters", "_buffers", "_modules")
# how deep lists in dicts in lists are looked into
DEEPEST = 3


def unregistered(subject: Subject, leaves: Sequence[Tensor]) -> list[Finding]:
    """Trainable tensors of the loss that are neither in params nor in the optimizer.

    A fault where a module that was given keeps them outside its registries (layers in a Python list, a parameter that
    was converted), and where they are parameters that no living optimizer holds. What another optimizer holds, a
    discriminator's say, is a note.

    Args:
        subject: what is proved.
        leaves: the graph's leaves that are known neither to the modules nor to the optimizers given.
    """
    kept = {id(leaf): name for name, leaf in _kept_outside_registries(subject)}
    foreign = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in kept]
    elsewhere = _held_by_any_optimizer() if foreign and subject.optimizers else set()
    lost = [leaf for leaf in leaves if id(leaf) in kept]
    if subject.optimizers:
        lost += [leaf for leaf in foreign if id(leaf) not in elsewhere]
    others = [leaf for leaf in foreign if not any(leaf is one for one in lost)]
    if others:
        shapes = name_some([_shape(leaf) for leaf in others])
        subject.notes.append(f"the loss also depends on {len(others)} trainable tensors that were not given: {shapes}")
    names = tuple(kept.get(id(leaf)) or _shape(leaf) for leaf in lost)
    names = tuple(name for name in names if not subject.allow.name(name))
    if not names:
        return []
    detail = f"the loss depends on {len(names)} trainable tensors that are neither in params nor in the optimizer: "
    return [Finding("unregistered", detail + name_some(names), names)]


def _kept_outside_registries(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    for root, module in subject.modules.items():
        for name, part in module.named_modules(prefix=root):
            for attribute, value in vars(part).items():
                if attribute not in _REGISTRIES and not attribute.startswith("_forward") and "hooks" not in attribute:
                    yield from _leaves_in(value, f"{name}.{attribute}" if name else attribute, DEEPEST)


def _leaves_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", p) for name, p in value.named_parameters())
    elif isinstance(value, Tensor):
        # of a parameter that was converted the leaf is the one before
        yield from ((path, leaf) for leaf in graph_leaves(value))
    elif depth and isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _leaves_in(item, f"{path}.{place}", depth - 1)
    elif depth and type(value) is dict:
        for key, item in value.items():
            yield from _leaves_in(item, f"{path}.{key}", depth - 1)


def _held_by_any_optimizer() -> set[int]:
    """Ids of the parameters in the groups of every optimizer that is alive in this process."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    groups = [group for o in alive for group in getattr(o, "param_groups", ())]
    return {id(p) for group in groups for p in group["params"]}


def _shape(tensor: Tensor) -> str:
    return f"<{'x'.join(map(str, tensor.shape)) or 'scalar'}>"
