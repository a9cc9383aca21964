"""Which parameters a tensor's values depend on, and through which cuts, kept apart from autograd.

A label is a set held as the bits of an int. Labels lie on storages, so that views and in-place writes share them;
storages are told apart by address, and a weak reference to each keeps its address from being given to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from qwen_fused.common.autograd_graph import graph_leaves

Key = int | tuple[str, int]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it is a wrapper of functorch's (vmap, jvp) around the tensor that holds the values."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Labels:
    """Labels of every tensor met during one call of a loss function.

    Three sets per tensor: `values`, the parameters its values depend on; `cuts`, the cuts on the way; and `alive`, the
    parameters that autograd still connects it to.

    Args:
        parameters: name -> parameter; bit i stands for the i-th.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.names = tuple(parameters)
        self._places = {name: place for place, name in enumerate(parameters)}
        self.bits = {id(p): 1 << i for i, p in enumerate(parameters.values())}
        self.trainable = sum(1 << i for i, p in enumerate(parameters.values()) if p.requires_grad)
        self._values: dict[Key, int] = {}
        self._cuts: dict[Key, int] = {}
        self._alive: dict[Key, int] = {}
        # a detached tensor shares its storage with the living one: what is said of it alone lies here
        self._own_cuts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._held: dict[Key, Any] = {}
        self.created: set[Key] = set()
        for i, parameter in enumerate(parameters.values()):
            key = self.key(parameter)
            self._values[key] = self._values.get(key, 0) | 1 << i
        # storages of the parameters themselves
        self.homes = dict(self._values)

    def key(self, tensor: Tensor) -> Key:
        """Identity of the tensor's storage, good for as long as this object lives."""
        while is_wrapped(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                self._held[key] = StorageWeakRef(storage)
        except (NotImplementedError, RuntimeError):
            # sparse and wrapper tensors have no storage of their own
            key = ("tensor", id(tensor))
            self._held[key] = tensor
        return key

    def names_of(self, label: int) -> tuple[str, ...]:
        """Names of the parameters in a label."""
        return tuple(name for i, name in enumerate(self.names) if label >> i & 1)

    def bit_of(self, name: str) -> int:
        """Label of one parameter."""
        return 1 << self._places[name]

    def values(self, tensor: Tensor) -> int:
        """Parameters that the tensor's values depend on."""
        # parameters that share one storage are still told apart
        return self.bits.get(id(tensor)) or self._values.get(self.key(tensor), 0)

    def values_of_all(self, tensors: Iterable[Tensor]) -> int:
        """Parameters that any of the tensors depends on."""
        return reduce(or_, map(self.values, tensors), 0)

    def cuts(self, tensor: Tensor) -> int:
        """Cuts between those parameters and the tensor."""
        return self._cuts.get(self.key(tensor), 0) | self._own_cuts.get(tensor, 0)

    def alive(self, tensor: Tensor) -> int:
        """Parameters that autograd connects the tensor to."""
        if not tensor.requires_grad:
            return 0
        bit = self.bits.get(id(tensor))
        if bit is not None or tensor.is_leaf:
            return bit or 0
        key = self.key(tensor)
        if key not in self._alive:
            self._alive[key] = self.reached_from(tensor)
        return self._alive[key]

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter, a view of one, or was computed during this call."""
        key = self.key(tensor)
        return key in self.created or key in self.homes

    def add_values(self, tensor: Tensor, values: int, cuts: int = 0) -> None:
        """Say that the tensor's storage now holds values that depend on `values`, through `cuts`."""
        key = self.key(tensor)
        if values:
            self._values[key] = self._values.get(key, 0) | values
        if cuts:
            self._cuts[key] = self._cuts.get(key, 0) | cuts

    def add_own_cuts(self, tensor: Tensor, cuts: int) -> None:
        """Say that this tensor, not all that share its storage, is behind `cuts`."""
        if cuts:
            self._own_cuts[tensor] = self._own_cuts.get(tensor, 0) | cuts

    def drop_own_cuts(self, tensor: Tensor, cuts: int) -> None:
        """Take `add_own_cuts` back."""
        if cuts:
            self._own_cuts[tensor] = self._own_cuts.get(tensor, 0) & ~cuts

    def set_alive(self, tensor: Tensor, alive: int) -> None:
        """Say which parameters an operation that requires grad connected its result to."""
        if tensor.requires_grad and not tensor.is_leaf:
            key = self.key(tensor)
            self._alive[key] = self._alive.get(key, 0) | alive

    def reached_from(self, tensor: Tensor) -> int:
        """Parameters found by walking the autograd graph back from the tensor."""
        reached = 0
        for leaf in graph_leaves(tensor):
            reached |= self.bits.get(id(leaf), 0)
        return reached
