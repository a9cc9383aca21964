"""Pieces of state that code may write to or replace, each able to put itself back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qwen_fused.proof.optimizers import copy_containers, tensors_of_state

# an optimizer's own attributes that are put back
PLAIN = (bool, int, float, str, type(None))


@dataclass
class HeldBuffer:
    """A buffer, its storage and its value; code may give it another storage, or another type."""

    buffer: Tensor
    alias: Tensor
    value: Tensor
    requires_grad: bool

    def put_back(self) -> None:
        """Set storage, type, value and requires_grad back."""
        self.alias.copy_(self.value)
        if not is_same(self.buffer.data, self.alias):
            self.buffer.data = self.alias
        if self.buffer.requires_grad != self.requires_grad:
            self.buffer.requires_grad_(self.requires_grad)


def is_same(tensor: Tensor, alias: Tensor) -> bool:
    """Whether both are one piece of memory, read in one way."""
    if type(tensor) is not type(alias) or tensor.dtype != alias.dtype or tensor.shape != alias.shape:
        return False
    return tensor.is_sparse or type(tensor) is not Tensor or tensor.data_ptr() == alias.data_ptr()


class AttributeMark:
    """The tensors among a module's plain attributes, as they were."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._values = dict(vars(module))
        tensors = [t for value in self._values.values() for t in _tensors(value)]
        self._contents = [(t, t.detach().clone()) for t in tensors if t.grad_fn is None and not t.requires_grad]

    def put_back(self) -> None:
        """Set back every attribute that is a tensor, or has become one, and what was written to those tensors."""
        now = vars(self._module)
        for name in [name for name in now if name not in self._values and _tensors(now[name])]:
            del now[name]
        for name, value in self._values.items():
            if now.get(name) is not value and (_tensors(value) or _tensors(now.get(name))):
                now[name] = value
        for tensor, value in self._contents:
            tensor.data.copy_(value)


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or those in a tuple; a module's registries are dicts and are not meant."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, tuple) else []


@dataclass
class HeldOptimizer:
    """An optimizer and what it held."""

    optimizer: Any
    tensors: list[tuple[Tensor, Tensor]]
    state: list[tuple[Any, Any]]
    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    rest: dict[str, Any]
    known: frozenset[str]

    @classmethod
    def of(cls, optimizer: Any, copy_of: Callable[[Tensor], Tensor]) -> HeldOptimizer:
        """Take an optimizer down."""
        held = getattr(optimizer, "state", {})
        groups = [(group, dict(group) | {"params": list(group["params"])}) for group in optimizer.param_groups]
        options = [value for _, group in groups for key, value in group.items() if key != "params"]
        tensors = [(value, copy_of(value)) for value in tensors_of_state([list(held.values()), options])]
        state = [(parameter, copy_containers(entries)) for parameter, entries in held.items()]
        rest = {k: v for k, v in vars(optimizer).items() if isinstance(v, PLAIN)}
        return cls(optimizer, tensors, state, groups, rest, frozenset(vars(optimizer)))

    def put_back(self) -> None:
        """Set everything back."""
        for tensor, value in self.tensors:
            tensor.copy_(value)
        if hasattr(self.optimizer, "state"):
            self.optimizer.state.clear()
            for parameter, entries in self.state:
                self.optimizer.state[parameter] = copy_containers(entries)
        self.optimizer.param_groups[:] = [group for group, _ in self.groups]
        for group, options in self.groups:
            group.clear()
            group.update(options)
        # a flag that its first step set, as a scheduler's wrapper does
        for key in [k for k, v in vars(self.optimizer).items() if k not in self.known and isinstance(v, PLAIN)]:
            del vars(self.optimizer)[key]
        vars(self.optimizer).update(self.rest)
