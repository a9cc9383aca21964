"""Follow what a loss is computed from, independently of autograd, and name the operations at which autograd loses it.

Two of torch's modes watch one call of the loss function. The dispatch mode sees every operation that computes (also
under no_grad, inside custom Functions and in scripted code) and carries labels from inputs to outputs. The function
mode sees what the user called, with the Python stack at hand, and compares: a parameter that an input is still
connected to, that the result's values depend on, and that the result is not connected to any more, is lost there.

A worked example: parameters a (bit 0b01) and b (bit 0b10), no cut met yet, and the loss function

    h = (a * b).detach()
    loss = (h * b).sum()

                      values   alive   cuts   seen by
    a                  0b01     0b01    0
    b                  0b10     0b10    0
    a * b              0b11     0b11    0     aten mul: its inputs' values together; autograd's graph: both alive
    .detach()          0b11     0       0b1   function mode: alive went in as 0b11, came out as 0, and the values still
                                              depend on 0b11: a cut that loses 0b11, the first, so its label is 0b1
    h * b              0b11     0b10    0b1   values and cuts are handed on; alive through b alone
    loss               0b11     0b10    0b1

The loss depends on a, is not connected to it, and lies behind the cut 0b1, which lost a: that line cuts a off. b was
lost there too and is connected another way: the cut is a partial one. Labels of values lie on storages, so that h,
which shares its storage with a * b, is told apart by labels of its own (`Labels.add_own_cuts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.cut_log import CutLog
from qwen_fused.proof.cuts import CustomOp, Event, Trace
from qwen_fused.proof.draws import watch_draw
from qwen_fused.proof.frames import NOWHERE
from qwen_fused.proof.labels import Labels, is_wrapped, tensors_in
from qwen_fused.proof.replay import NormalDraw, PaddedRows, Record, capture
from qwen_fused.proof.slots import Slot, Slots

OnCustom = Callable[[CustomOp, Callable[..., Any], tuple, dict, Any], None]


def trace(
    loss_fn: Callable[[], Any],
    parameters: Mapping[str, Tensor],
    on_custom: OnCustom | None = None,
    earlier: Labels | None = None,
    trusted: Callable[[str], bool] = lambda name: False,
) -> Trace:
    """Call the loss function once and follow the parameters through it.

    Compiled functions run their source meanwhile. Operations that other threads make are not seen, only that there were
    other threads.

    Args:
        loss_fn: called without arguments.
        parameters: name -> parameter.
        on_custom: called with every custom operation that depends on a parameter, its callable, arguments and result.
        earlier: labels of an earlier call; what that computed and this one still uses is listed as kept.
        trusted: whether a torch function of that name is to be taken at its word, as a custom operation may be.
    """
    tracer = Tracer(parameters, on_custom, earlier, trusted)
    with (
        modes.uncompiled(tracer.trace.compiled.append),
        modes.on_apply(tracer.apply),
        modes.on_inference_mode(lambda: tracer.log.switch.note("inference_mode", False)),
        modes.on_thread(tracer.note_thread),
        modes.FunctionMode(tracer.call),
        modes.DispatchMode(tracer.aten),
    ):
        tracer.trace.loss = frames.boundary(loss_fn)
    if isinstance(tracer.trace.loss, Tensor):
        tracer.log.look_for_unseen([tracer.trace.loss])
        tracer.log.explain_aliases(tracer.trace.loss)
        tracer.log.mark_continued([tracer.trace.loss])
    return tracer.trace


class Tracer:
    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_custom: OnCustom | None,
        earlier: Labels | None,
        trusted: Callable[[str], bool],
    ):
        self.labels = Labels(parameters)
        self.earlier = earlier
        self.trace = Trace(self.labels)
        self.on_custom = on_custom
        self.trusted = trusted
        self.log = CutLog(self.labels, self.trace)
        self.slots = Slots()
        self.busy = False
        self.nested = 0  # depth inside custom Functions
        self.touched = 0  # parameters met alive inside them

    def aten(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Carry labels through one operation that computes."""
        labels = self.labels
        values = cuts = 0
        keys = set()
        for tensor in tensors_in((args, kwargs)):
            keys.add(labels.key(tensor))
            if not kinds.ignores_values(func):
                values |= labels.values(tensor)
                cuts |= labels.cuts(tensor)
        out = func(*args, **kwargs)
        self.trace.used |= values
        for tensor in tensors_in(out):
            if labels.key(tensor) not in keys:
                labels.created.add(labels.key(tensor))
                labels.add_values(tensor, values, cuts)
        for tensor in kinds.written_by(func, args, kwargs):
            self.log.written.add(labels.key(tensor))
            self.trace.rewritten |= labels.homes.get(labels.key(tensor), 0)
            labels.add_values(tensor, values, cuts)
        if kinds.is_collective(func):
            self.log.collective(func, args, values, cuts, inside=bool(self.nested))
        return out

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """See one call that the user, or a library, made."""
        self.log.calls += 1
        name = kinds.name_of(func)
        slot = self.slots.next(name)
        if self.busy:
            return func(*args, **kwargs)
        self.busy = True
        try:
            if name == "_set_grad_enabled":
                self.log.switch.note("no_grad", args[0])
                return func(*args, **kwargs)
            ins = list(tensors_in((args, kwargs)))
            if name in ("requires_grad_", "requires_grad.__set__"):
                return self.log.switch_parameter(func, name, ins[0], args, kwargs)
            if any(is_wrapped(tensor) for tensor in ins):
                if any(torch._C._functorch.is_gradtrackingtensor(tensor) for tensor in ins):
                    self.trace.differentiated |= self.labels.values_of_all(ins)
                # inside vmap or jvp a wrapper says nothing of what autograd connects: what comes out of it is looked at
                return func(*args, **kwargs)
            self.trace.differentiates |= name in ("grad", "backward")
            seen = self._look_at(ins)
            self.trace.differentiated |= seen[0] if name == "grad" else 0
            self.log.written.clear()
            out = watch_draw(self.trace.draws, func, name, slot, args, kwargs)
            self._after(func, name, slot, ins, (args, kwargs), out, seen)
            return out
        finally:
            self.busy = False

    def apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """See one call of a custom autograd Function, inside and out."""
        self.log.calls += 1
        slot = self.slots.next(f"{cls.__name__}.apply")
        if self.busy:
            return call(*args, **kwargs)
        ins = list(tensors_in((args, kwargs)))
        with torch._C.DisableTorchFunction():
            alive, values, cuts = self._look_at(ins)
        outer, self.touched = self.touched, 0
        self.nested += 1
        try:
            out = call(*args, **kwargs)
        finally:
            self.nested -= 1
        inside, self.touched = self.touched, outer | self.touched
        with torch._C.DisableTorchFunction():
            for tensor in tensors_in(out):
                # a kernel called through a pointer is seen by neither mode
                self.labels.add_values(tensor, values, cuts)
                # reentrant checkpointing runs the segment again in its backward, and delivers to everything inside
                reached = self.labels.values(tensor) & (alive | inside) if kinds.recomputes(cls) else alive
                self.labels.set_alive(tensor, reached)
            if not self.nested:
                self.log.lose(cls, cls.__name__, slot, ins, out, alive | inside, cuts)
                if not kinds.recomputes(cls):
                    surrogate = kinds.is_surrogate(cls, cls.__name__, args, kwargs)
                    self._custom(slot, values | inside, call, args, kwargs, out, surrogate)
        return out

    def _look_at(self, ins: list[Tensor]) -> tuple[int, int, int]:
        """Labels of a call's arguments, together: alive, values, cuts."""
        labels = self.labels
        alive = values = cuts = 0
        for tensor in ins:
            if tensor.requires_grad:
                self._look_at_origin(tensor)
            elif self.earlier is not None and not labels.is_known(tensor) and self.earlier.values(tensor):
                self.trace.kept.append((self.earlier.values(tensor), frames.locate()))
                labels.created.add(labels.key(tensor))
            alive |= labels.alive(tensor)
            values |= labels.values(tensor)
            cuts |= labels.cuts(tensor)
        if self.nested:
            self.touched |= alive
        elif values & labels.trainable & ~alive & ~self.log.lost_behind(cuts):
            self.log.look_for_unseen(ins)
            for tensor in ins:
                cuts |= labels.cuts(tensor)
        return alive, values, cuts

    def _look_at_origin(self, tensor: Tensor) -> None:
        """Notice a parameter made during this call, and a graph left over from an earlier one."""
        labels = self.labels
        if not tensor.is_leaf:
            if not labels.is_known(tensor) and labels.alive(tensor):
                self.trace.stale.append((labels.alive(tensor), frames.locate()))
                labels.created.add(labels.key(tensor))
        elif isinstance(tensor, nn.Parameter) and labels.key(tensor) in labels.created and not self._met(tensor):
            self.trace.fresh.append((tensor, frames.locate()))

    def _met(self, parameter: Tensor) -> bool:
        return id(parameter) in self.labels.bits or any(parameter is known for known, _ in self.trace.fresh)

    def _after(
        self,
        func: Any,
        name: str,
        slot: Slot,
        ins: list[Tensor],
        given: tuple[tuple, dict],
        out: Any,
        seen: tuple[int, int, int],
    ) -> None:
        """Label a call's result, and note what the call did to the gradient."""
        alive, values, cuts = seen
        labels = self.labels
        outs = list(tensors_in(out))
        if discrete := kinds.discrete_among(name, ins, outs):
            held = capture(ins, out, discrete)
            if func is torch.normal and len(given[0]) == 2 and "out" not in given[1]:
                mean, deviation = (t.detach().clone() if isinstance(t, Tensor) else t for t in given[0])
                held = NormalDraw(held.outputs, given=(mean, deviation))
            self._fix(name, slot, held)
        if func is embedding and (padded := self._padded(out, *given)):
            self._fix(name, slot, padded)
        if not values or (not outs and not self.log.written and name not in kinds.DEPARTURES):
            if name == "register_hook" and values:
                self.trace.hooks.append(frames.locate())
            return
        if name in kinds.DEPARTURES:
            self.log.depart(name, slot, ins, out, values)
            return
        self.log.mark_continued(ins)
        for tensor in outs:
            self.trace.half |= tensor.dtype in (torch.float16, torch.bfloat16)
            if func in kinds.COPIES_VALUES:
                labels.add_values(tensor, values, cuts)
        if self.nested:
            return
        for tensor in outs + [t for t in ins if labels.key(t) in self.log.written]:
            labels.set_alive(tensor, alive)
        self.log.lose(func, name, slot, ins, out, alive, cuts)
        surrogate = kinds.is_surrogate(func, name, *given)
        if alive and (surrogate or kinds.is_custom(func) or self._is_trusted(name, outs)):
            self._custom(slot, values, func, *given, out, surrogate=surrogate)

    def _fix(self, name: str, slot: Slot, record: Record | PaddedRows) -> None:
        """Have a call's result, or a part of it, held still at further evaluations."""
        self.trace.fixed.append(Event("fixed", name, NOWHERE, 0, self.log.calls, slot=slot, record=record))

    @staticmethod
    def _padded(out: Tensor, args: tuple, kwargs: dict) -> PaddedRows | None:
        """Rows of a lookup to which torch gives no gradient, whatever the loss makes of them."""
        padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        if padding is None or not out.requires_grad:
            return None
        index, table = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
        return PaddedRows.of(index, padding % len(table), out)

    def _is_trusted(self, name: str, outs: list[Tensor]) -> bool:
        return any(t.requires_grad for t in outs) and self.trusted(name)

    def _custom(
        self,
        slot: Slot,
        inputs: int,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        out: Any,
        surrogate: bool = False,
    ) -> None:
        name, draw = slot.name.removesuffix(".apply"), self.trace.draws.get(slot)
        op = CustomOp(slot, name, frames.locate(), inputs, surrogate, draw)
        self.trace.custom.append(op)
        if self.on_custom is not None:
            self.on_custom(op, call, args, kwargs, out)

    def note_thread(self) -> None:
        """Note that another thread was given something to do."""
        self.trace.threads = True
