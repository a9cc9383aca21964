"""Call a loss function again with chosen results held at recorded values.

Autograd takes what lies behind a cut as constant. A finite difference agrees with it only if that is constant too, so
every cut's result is recorded once and put back at each further evaluation. The calls are matched by name, line and
order, which the recorded results themselves keep the same: a branch taken on a tensor's value is recorded as well.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.labels import tensors_in


class Slot(NamedTuple):
    """The number-th call of a function from one line of source during an evaluation."""

    name: str
    file: str
    line: int
    number: int


class Slots:
    """Gives each call of an evaluation its slot."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def next(self, name: str) -> Slot:
        """The slot of the call that is being made now."""
        place = (name, *frames.line_of_call())
        self._counts[place] += 1
        return Slot(*place, self._counts[place])


class Held(Protocol):
    """Something that takes the place of a call's result."""

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The result to go on with, given the call's tensors and its own result."""


@dataclass
class Record:
    """Results of one call: tensors by place in the result, tensors written in place, or a value that left tensors."""

    outputs: dict[int, Tensor] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)
    value: Any = None
    departed: bool = False

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """Put the recorded tensors in place of the new ones."""
        if self.departed:
            return copy.deepcopy(self.value)
        results = list(tensors_in(out))
        for places, tensors in ((self.written, ins), (self.outputs, results)):
            if any(p >= len(tensors) or tensors[p].shape != t.shape for p, t in places.items()):
                raise ReplayMismatch("a call gave a result of another shape than before")
        with torch.no_grad():
            for place, tensor in self.written.items():
                ins[place].copy_(tensor)
        return replace_tensors(out, {place: tensor.clone() for place, tensor in self.outputs.items()})


@dataclass
class Perturbation:
    """Move a value that left tensors, to see whether the loss hears of it."""

    by: float

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The value, moved; left alone where it is no floating-point number."""
        return _moved(out, self.by)


class ReplayMismatch(RuntimeError):
    """The loss function did not make the same calls again."""


def capture(ins: list[Tensor], out: Any, dead: list[Tensor] | None = None) -> Record:
    """Record a call's result.

    Args:
        ins: the tensors among its arguments.
        out: its result.
        dead: the tensors to record, among the result and the arguments written in place; all of the result by default.
    """
    results = list(tensors_in(out))
    if not results and dead is None:
        return Record(value=copy.deepcopy(out), departed=True)
    record = Record()
    wanted = results if dead is None else dead
    for places, tensors in ((record.written, ins), (record.outputs, results)):
        for place, tensor in enumerate(tensors):
            is_wanted = any(tensor is w for w in wanted)
            if is_wanted and not (places is record.outputs and any(tensor is i for i in ins)):
                places[place] = tensor.detach().clone()
    return record


def replace_tensors(tree: Any, replacements: Mapping[int, Tensor]) -> Any:
    """The same nested tuples, lists and dicts with the given tensors, counted in order, replaced."""
    counter = iter(range(sys.maxsize))

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            return replacements.get(next(counter), node)
        if isinstance(node, (list, tuple)):
            items = [walk(item) for item in node]
            return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
        if isinstance(node, dict):
            return {key: walk(item) for key, item in node.items()}
        return node

    return walk(tree) if replacements else tree


@dataclass(frozen=True)
class Upcast:
    """Compute in another floating-point type than the loss function asks for, with parameters at exact values.

    Every floating-point argument of every call is converted, and so is every type that is asked for by name. Autocast
    leaves float64 alone. What is written in place keeps its type.
    """

    dtype: torch.dtype
    values: Mapping[int, Tensor]  # id of a parameter -> its value in that type

    def arguments(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call's arguments, converted."""
        if name.endswith(".__set__") or (name.endswith(".__get__") and name.split(".")[0] not in _VIEWS):
            return args, kwargs
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _WRITES
        target = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        dtype = target.dtype if target is not None and target.is_floating_point() else self.dtype

        def convert(node: Any) -> Any:
            if isinstance(node, Tensor):
                if node is target or not node.is_floating_point():
                    return node
                return self.values.get(id(node), node).to(dtype)
            if isinstance(node, torch.dtype):
                return self.dtype if node in _NARROW else node
            if type(node) in (list, tuple):
                return type(node)(convert(item) for item in node)
            return node

        return tuple(convert(a) for a in args), {key: convert(value) for key, value in kwargs.items()}

    @contextmanager
    def by_default(self) -> Iterator[None]:
        """Make new tensors of this type too."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_VIEWS = ("T", "mT", "H", "mH", "real", "imag", "data")
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
_CASTS = {"float", "half", "bfloat16"}


class _Replay:
    def __init__(self, held: Mapping[Slot, Held], wide: Upcast | None):
        self.held = dict(held)
        self.wide = wide
        self.slots = Slots()

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = kinds.name_of(func)
        if self.wide is not None and name in _CASTS:
            # masks and counts become floating point here, in the wide type
            wide = self.wide.dtype
            func = lambda tensor, **_: tensor.to(wide)  # noqa: E731
        return self._put(name, func, args, kwargs)

    def apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return self._put(f"{cls.__name__}.apply", call, args, kwargs)

    def _put(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        held = self.held.pop(self.slots.next(name), None)
        if self.wide is not None:
            with torch._C.DisableTorchFunction():
                args, kwargs = self.wide.arguments(name, args, kwargs)
        out = call(*args, **kwargs)
        if self.wide is not None and name == "dtype.__get__" and out in _NARROW:
            # parameters and inputs look as wide as what is computed from them
            return self.wide.dtype
        if held is None:
            return out
        with torch._C.DisableTorchFunction():
            return held.put(list(tensors_in((args, kwargs))), out)


def evaluate(loss_fn: Callable[[], Any], held: Mapping[Slot, Held], wide: Upcast | None = None) -> Any:
    """Call the loss function with the held results in place of its own.

    Args:
        loss_fn: called without arguments.
        held: call -> what takes the place of its result.
        wide: the type to compute in, and the parameters' values; as the loss function says when None.
    Raises:
        ReplayMismatch: when its calls are not those of the evaluation that was recorded.
    """
    if not held and wide is None:
        return frames.boundary(loss_fn)
    replay = _Replay(held, wide)
    widened = nullcontext() if wide is None else wide.by_default()
    with modes.uncompiled(), modes.on_apply(replay.apply), modes.FunctionMode(replay.call), widened:
        loss = frames.boundary(loss_fn)
    if replay.held:
        raise ReplayMismatch(
            f"{len(replay.held)} recorded calls were not made again, {next(iter(replay.held)).name} first"
        )
    return loss


def _moved(value: Any, by: float) -> Any:
    if isinstance(value, float):
        return value + by * max(abs(value), 1.0)
    if isinstance(value, list):
        return [_moved(item, by) for item in value]
    if getattr(getattr(value, "dtype", None), "kind", "") == "f":
        return value + value.dtype.type(by) * (abs(value) + 1)
    return value
