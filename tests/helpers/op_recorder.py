"""What a CUDA graph does, on any device: operations are recorded once and replayed on the tensors that they had.

A mode sees every operation that reaches a device: those of forward, of backward, of an optimizer. While they are
recorded they run, since Python needs their shapes, and what they wrote to is put back afterwards, as a graph's
recording runs nothing. A replay runs the same operations on the same tensors, into the memory of the results that they
had: what Python decided, a number, a branch, a tensor that is replaced, stays as it was while recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what torch says of operations that no graph holds, or that draw, and so move a generator
UNFIT = {
    torch.Tag.data_dependent_output: "reads on the host",
    torch.Tag.dynamic_output_shape: "has results of a size that only the device knows",
    torch.Tag.nondeterministic_seeded: "draws",
}


def tensors_of(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written(operation: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation writes to."""
    schema = operation._schema.arguments
    given = {**{a.name: value for a, value in zip(schema, args, strict=False)}, **kwargs}
    return [
        x for a in schema if a.alias_info is not None and a.alias_info.is_write for x in tensors_of(given.get(a.name))
    ]


class Recorder(TorchDispatchMode):
    """Collects operations and, of those that can't be recorded, complaints."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.complaints: list[str] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.complaints += [f"{operation} {why}" for tag, why in UNFIT.items() if tag in operation.tags]
        for tensor in written(operation, args, kwargs):
            # what was there before the recording is put back after it
            if memory_of(tensor) not in self.made and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.detach().clone()
        results = operation(*args, **kwargs)
        out = tensors_of(results)
        self.made |= {memory_of(x) for x in out} - {memory_of(x) for x in tensors_of((args, kwargs))}
        self.operations.append((operation, args, kwargs, out))
        return results

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, out in self.operations:
            given = {memory_of(x) for x in tensors_of((args, kwargs))}
            for old, new in zip(out, tensors_of(operation(*args, **kwargs)), strict=True):
                # a view, or what was written in place, is where it was
                if memory_of(new) not in given:
                    old.copy_(new)


class OpGraphs:
    """Stands for `CudaGraphs`; `recorders` are those so far."""

    def __init__(self, device: torch.device, *, refuse: bool = True):
        self.device, self.refuse = device, refuse
        self.recorders: list[Recorder] = []

    def record(self, body: Callable[[], Any]) -> Callable[[], Any]:
        recorder = Recorder(self.device)
        try:
            with recorder:
                result = body()
        finally:
            recorder.put_back()
        if self.refuse and recorder.complaints:
            raise AssertionError("; ".join(dict.fromkeys(recorder.complaints)))
        self.recorders.append(recorder)
        # a graph's results hold nothing before its first replay
        for tensor in {id(x): x for x in tensors_of_result(result)}.values():
            if memory_of(tensor) in recorder.made:
                tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 7)

        def replay() -> Any:
            recorder.replay()
            return result

        return replay


def tensors_of_result(result: Any) -> list[Tensor]:
    """Tensors in a result, and in the fields of its objects."""
    found = []
    for leaf in tree_leaves(result):
        found += [leaf] if isinstance(leaf, Tensor) else [x for x in vars(leaf).values() if isinstance(x, Tensor)]
    return found
