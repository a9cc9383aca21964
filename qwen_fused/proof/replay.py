"""Call a loss function again with chosen results held at recorded values.

Autograd takes what lies behind a cut as constant. A finite difference agrees with it only if that is constant too, so
every cut's result is recorded once and put back at each further evaluation. The calls are matched by name, line and
order, which the recorded results themselves keep the same: a branch taken on a tensor's value is recorded as well.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.draws import Draw
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.slots import Collectives, Slot, Slots
from qwen_fused.proof.upcast import CASTS, PLAIN_FORMS, Upcast


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
    draw: Draw | None = None

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
class NormalDraw(Record):
    """Numbers drawn around a mean: held as they were drawn or, once nothing is cut, at their distance from the mean."""

    given: tuple[Any, Any] = (0.0, 1.0)  # mean and deviation then: tensors or numbers
    follows: bool = False

    def following(self) -> NormalDraw:
        """The same draw, of the mean and the deviation that it is asked for."""
        return replace(self, follows=True)

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The numbers as they were drawn, moved with mean and deviation where they follow."""
        (drawn,) = self.outputs.values()
        if not self.follows:
            return super().put(ins, out)
        rest = iter(ins)
        mean, deviation = (next(rest) if isinstance(then, Tensor) else then for then in self.given)
        noise = (drawn - self.given[0]) / self.given[1]
        return mean + noise * deviation


@dataclass
class Gathered:
    """Holds what other processes sent at its recorded values: no gradient goes back to them."""

    tensors: list[Tensor]

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """Write the recorded values over what was sent now."""
        for tensor, value in zip(ins, self.tensors, strict=True):
            # through an alias: autograd may already hold the tensor for a view that nobody may write to
            tensor.data.copy_(value)
        return out


@dataclass
class PaddedRows:
    """Holds the rows looked up for padding, which autograd takes as constant, at their recorded values."""

    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, index: Tensor, padding: int, found: Tensor) -> PaddedRows | None:
        """Those of a lookup; None where nothing is padded."""
        rows = index == padding
        return cls(rows, found.detach()[rows]) if rows.any() else None

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The lookup's result with those rows as they were."""
        if out.shape[:-1] != self.rows.shape:
            raise ReplayMismatch("a call gave a result of another shape than before")
        return out.masked_scatter(self.rows[..., None], self.values.to(out.dtype))


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


class _Replay:
    def __init__(self, held: Mapping[Slot, Held], upcast: Upcast | None, draws: Mapping[Slot, Draw]):
        self.held = dict(held)
        self.upcast = upcast
        self.draws = draws
        self.slots, self.collectives = Slots(), Collectives()
        self.gathers = any(isinstance(record, Gathered) for record in held.values())

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = kinds.name_of(func)
        if name in ("register_hook", "retain_grad") and not args[0].requires_grad:
            # nothing is sent back here, and torch would refuse
            return RemovableHandle(OrderedDict()) if name == "register_hook" else None
        if self.upcast is not None and name in CASTS:
            # masks and counts become floating point here, in the wide type
            wide = self.upcast.dtype
            func = lambda tensor, **_: tensor.to(wide)  # noqa: E731
        if self.upcast is not None and self.upcast.dtype == torch.float64:
            func = PLAIN_FORMS.get(name, func)
        return self._put(name, func, args, kwargs)

    def apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return self._put(f"{cls.__name__}.apply", call, args, kwargs)

    def aten(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Below autograd: what processes exchange, which the function mode does not see."""
        out = func(*args, **kwargs)
        if not kinds.is_collective(func):
            return out
        held = self.held.pop(self.collectives.next(), None)
        return out if held is None else held.put(list(tensors_in(args[0])), out)

    def _put(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        slot = self.slots.next(name)
        held, draw = self.held.pop(slot, None), self.draws.get(slot)
        if self.upcast is not None:
            with torch._C.DisableTorchFunction():
                args, kwargs = self.upcast.arguments(name, args, kwargs)
        out = call(*args, **kwargs) if draw is None else draw.again(call, args, kwargs)
        if self.upcast is not None and name == "dtype.__get__":
            # parameters and inputs look as wide as what is computed from them
            return self.upcast.widened(out)
        if held is None:
            return out
        with torch._C.DisableTorchFunction():
            return held.put(list(tensors_in((args, kwargs))), out)


def evaluate(
    loss_fn: Callable[[], Any],
    held: Mapping[Slot, Held],
    upcast: Upcast | None = None,
    draws: Mapping[Slot, Draw] | None = None,
) -> Any:
    """Call the loss function with the held results in place of its own.

    Args:
        loss_fn: called without arguments.
        held: call -> what takes the place of its result.
        upcast: the type to compute in, and the parameters' values; as the loss function says when None.
        draws: call -> the generators' states around it.
    Raises:
        ReplayMismatch: when its calls are not those of the evaluation that was recorded.
    """
    if not held and upcast is None:
        return frames.boundary(loss_fn)
    replay = _Replay(held, upcast, draws or {})
    widened = nullcontext() if upcast is None else upcast.by_default()
    exchanged = modes.DispatchMode(replay.aten) if replay.gathers else nullcontext()
    with modes.uncompiled(), modes.on_apply(replay.apply), modes.FunctionMode(replay.call), exchanged, widened:
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
