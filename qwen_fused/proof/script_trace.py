"""Follow parameters through somebody else's script, from its first optimizer on; idle before, and where told to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.cut_log import CutLog
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.labels import Labels, tensors_in
from qwen_fused.proof.trace import Tracer

# key in an autograd node's metadata for where the script called it
SITE = "qwen_fused.site"


class GrowingLabels(Labels):
    """Labels of parameters that are made known one by one; bit i stands for the i-th."""

    def __init__(self) -> None:
        super().__init__({})
        self.known: list[Tensor] = []

    def add(self, parameter: Tensor) -> None:
        """Follow this parameter too."""
        if id(parameter) in self.bits:
            return
        bit = 1 << len(self.known)
        # held, so that its identity stays its own
        self.known.append(parameter)
        self.bits[id(parameter)] = bit
        self._name([*self.names, str(len(self.known))])
        self.trainable |= bit if parameter.requires_grad else 0
        self.settle(parameter)

    def rename(self, names: Mapping[int, str]) -> None:
        """Give the parameters the names that go with their ids."""
        self._name([names[id(parameter)] for parameter in self.known])

    def _name(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._places = {name: place for place, name in enumerate(names)}

    def settle(self, parameter: Tensor) -> None:
        """Say that a followed parameter's values lie where they do now: moved or cast, they are still its own."""
        key = self.key(parameter)
        self._values[key] = self.bits[id(parameter)] | self.homes.get(key, 0)
        self._cuts.pop(key, None)
        self.homes[key] = self._values[key]

    def add_values(self, tensor: Tensor, values: int, cuts: int = 0) -> None:
        # what is written into a parameter, as its initial values are, becomes its own
        if self.key(tensor) not in self.homes:
            super().add_values(tensor, values, cuts)


class ScriptTracer(Tracer):
    """The tracer of a proof, for a run that happens once: nothing is kept for doing it again."""

    def __init__(self) -> None:
        super().__init__({}, None, None, trusted=lambda name: False)
        self.labels: GrowingLabels = GrowingLabels()
        self.trace = Trace(self.labels)
        self.log = CutLog(self.labels, self.trace)
        self.active = False
        self.erasures: dict[int, frames.Site] = {}  # id of a parameter -> where its gradient was last taken away
        self.closed: set[int] = set()  # ids of parameters whose step is over
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch this thread; at the bottom of torch's stacks of modes, so that the script's own come and go above."""
        with ExitStack() as stack:
            stack.enter_context(modes.on_apply(self._or_idle_apply))
            stack.enter_context(modes.on_inference_mode(self._on_inference_mode))
            stack.enter_context(modes.FunctionMode(self._or_idle(self.call)))
            stack.enter_context(modes.DispatchMode(self._or_idle(self.aten)))
            yield

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """See one call, and leave on the autograd nodes that it makes where it was."""
        cleared = self._gradients_in(func, args)
        out = super().call(func, args, kwargs)
        for parameter in cleared:
            if id(parameter) not in self.closed and (parameter.grad is None or not parameter.grad.any()):
                self.erasures[id(parameter)] = frames.locate()
        if kinds.name_of(func) == "data.__set__" and id(args[0]) in self.labels.bits:
            self.labels.settle(args[0])
        self._leave_site(out)
        for kept in (self.trace.fixed, self.trace.draws, self.trace.custom):
            kept.clear()
        for event in (*self.trace.cuts[-2:], *self.trace.departures[-1:]):
            event.record = None
        return out

    def apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """See one call of a custom autograd Function."""
        out = super().apply(cls, call, args, kwargs)
        self._leave_site(out)
        return out

    @staticmethod
    def _leave_site(out: Any) -> None:
        site = None
        for tensor in tensors_in(out):
            # typed as a method by torch's stubs
            metadata: Any = None if tensor.grad_fn is None else tensor.grad_fn.metadata
            if metadata is not None and SITE not in metadata:
                site = site or frames.locate()
                metadata[SITE] = site

    def _gradients_in(self, func: Any, args: tuple) -> list[Tensor]:
        """Followed parameters whose gradient a call is about to replace, or to fill with zeros."""
        name = kinds.name_of(func)
        if name == "grad.__set__":
            return [p for p in args[:1] if id(p) in self.labels.bits and p.grad is not None]
        if name in ("zero_", "_foreach_zero_"):
            given = {id(tensor) for tensor in tensors_in(args)}
            return [p for p in self.labels.known if p.grad is not None and id(p.grad) in given]
        return []

    def _idle(self) -> bool:
        # a data loader's worker is a copy of this process, modes included
        return not self.active or os.getpid() != self._process

    def _or_idle(self, handler: modes.Handler) -> modes.Handler:
        def handle(func: Any, args: tuple, kwargs: dict) -> Any:
            return func(*args, **kwargs) if self._idle() else handler(func, args, kwargs)

        return handle

    def _or_idle_apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return call(*args, **kwargs) if self._idle() else self.apply(cls, call, args, kwargs)

    def _on_inference_mode(self) -> None:
        if not self._idle():
            self.log.switch.note("inference_mode", False)


def joint_loss(labels: Labels, values: int, cuts: int, alive: int) -> Tensor:
    """One tensor that stands for all the losses that were sent back before a step."""
    joint = torch.zeros((), requires_grad=True).clone()
    labels.add_values(joint, values, cuts)
    labels.set_alive(joint, alive)
    return joint
