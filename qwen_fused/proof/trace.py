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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.common.random_state import RandomState
from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.cuts import CustomOp, Event, Trace
from qwen_fused.proof.frames import NOWHERE, Site
from qwen_fused.proof.labels import Key, Labels, is_wrapped, tensors_in
from qwen_fused.proof.replay import Draw, Slot, Slots, capture
from qwen_fused.proof.switches import GradientSwitch

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
    tracer = _Tracer(parameters, on_custom, earlier, trusted)
    with (
        modes.uncompiled(),
        modes.on_apply(tracer.apply),
        modes.on_inference_mode(lambda: tracer.switch.note("inference_mode", False)),
        modes.on_thread(tracer.note_thread),
        modes.FunctionMode(tracer.call),
        modes.DispatchMode(tracer.aten),
    ):
        tracer.trace.loss = frames.boundary(loss_fn)
    if isinstance(tracer.trace.loss, Tensor):
        tracer.look_for_unseen([tracer.trace.loss])
        tracer.mark_continued([tracer.trace.loss])
    return tracer.trace


class _Tracer:
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
        self.calls = 0
        self.slots = Slots()
        self.busy = False
        self.nested = 0  # depth inside custom Functions
        self.touched = 0  # parameters met alive inside them
        self.written: set[Key] = set()
        self.aliases: dict[Key, list[Event]] = {}
        self.sources: dict[Key, list[Event]] = {}
        self.switch = GradientSwitch()
        self._lost_memo: dict[int, int] = {}

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
            self.written.add(labels.key(tensor))
            self.trace.rewritten |= labels.homes.get(labels.key(tensor), 0)
            labels.add_values(tensor, values, cuts)
        return out

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """See one call that the user, or a library, made."""
        self.calls += 1
        name = kinds.name_of(func)
        slot = self.slots.next(name)
        if self.busy:
            return func(*args, **kwargs)
        self.busy = True
        try:
            if name == "_set_grad_enabled":
                self.switch.note("no_grad", args[0])
                return func(*args, **kwargs)
            ins = list(tensors_in((args, kwargs)))
            if name in ("requires_grad_", "requires_grad.__set__"):
                return self._switch_parameter(func, name, ins[0], args, kwargs)
            if any(is_wrapped(tensor) for tensor in ins):
                # inside vmap or jvp a wrapper says nothing of what autograd connects: what comes out of it is looked at
                return func(*args, **kwargs)
            self.trace.differentiates |= name in ("grad", "backward")
            seen = self._look_at(ins)
            self.written.clear()
            out = self._watch_draw(func, name, slot, args, kwargs)
            self._after(func, name, slot, ins, (args, kwargs), out, seen)
            return out
        finally:
            self.busy = False

    def apply(self, cls: type, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """See one call of a custom autograd Function, inside and out."""
        self.calls += 1
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
                self._lose(cls, cls.__name__, slot, ins, out, alive | inside, cuts)
                if not kinds.recomputes(cls):
                    surrogate = kinds.is_surrogate(cls, cls.__name__)
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
        elif values & labels.trainable & ~alive & ~self._lost_behind(cuts):
            self.look_for_unseen(ins)
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
            self.trace.fixed.append(Event("fixed", name, NOWHERE, 0, self.calls, slot=slot, record=held))
        if not values or (not outs and not self.written and name not in kinds.DEPARTURES):
            if name == "register_hook" and values:
                self.trace.hooks.append(frames.locate())
            return
        if name in kinds.DEPARTURES:
            self._depart(name, slot, ins, out, values)
            return
        self.mark_continued(ins)
        for tensor in outs:
            self.trace.half |= tensor.dtype in (torch.float16, torch.bfloat16)
            if func in kinds.COPIES_VALUES:
                labels.add_values(tensor, values, cuts)
        if self.nested:
            return
        for tensor in outs + [t for t in ins if labels.key(t) in self.written]:
            labels.set_alive(tensor, alive)
        self._lose(func, name, slot, ins, out, alive, cuts)
        surrogate = kinds.is_surrogate(func, name)
        if alive and (surrogate or kinds.is_custom(func) or self._is_trusted(name, outs)):
            self._custom(slot, values, func, *given, out, surrogate=surrogate)

    def _is_trusted(self, name: str, outs: list[Tensor]) -> bool:
        return any(t.requires_grad for t in outs) and self.trusted(name)

    def _watch_draw(self, func: Any, name: str, slot: Slot, args: tuple, kwargs: dict) -> Any:
        """Make the call, and take down the generators around it where it draws from them."""
        if name.endswith("__"):
            return func(*args, **kwargs)
        own = kwargs.get("generator")
        states = own.get_state() if isinstance(own, torch.Generator) else None
        before = RandomState.now()
        out = func(*args, **kwargs)
        after = RandomState.now()
        if isinstance(own, torch.Generator) and states is not None:
            self.trace.draws[slot] = Draw(before, after, (own, states, own.get_state()))
        elif after != before:
            self.trace.draws[slot] = Draw(before, after)
        return out

    def _switch_parameter(self, func: Any, name: str, tensor: Tensor, args: tuple, kwargs: dict) -> Any:
        """Note that a tensor is told to ask for no gradient, or to ask for one again: nothing is written to it."""
        labels = self.labels
        alive, cuts = labels.alive(tensor), labels.cuts(tensor)
        out = func(*args, **kwargs)
        if tensor.requires_grad:
            for event in self._events_of(cuts):
                # what it was behind can be carried on from here; what switched it off is over
                event.carried = event.kind != "requires_grad"
            labels.drop_own_cuts(tensor, sum(e.bit for e in self._events_of(cuts) if e.kind == "requires_grad"))
        elif alive:
            labels.add_own_cuts(tensor, self._note(func, name, [(tensor, alive)], "requires_grad").bit)
        return out

    def _lose(self, func: Any, name: str, slot: Slot, ins: list[Tensor], out: Any, alive: int, cuts: int) -> None:
        """Compare what went in alive with what came out, note a cut, and hand the cuts on."""
        labels = self.labels
        homes = {labels.key(tensor) for tensor in ins}
        results = list(tensors_in(out))
        for key in self.written:
            for alias in self.aliases.get(key, ()):
                alias.aliased = True
        results += [t for t in ins if labels.key(t) in self.written and not any(t is r for r in results)]
        dead = [(t, alive & labels.values(t) & ~labels.alive(t)) for t in results]
        event: Event | None = None
        if any(lost for _, lost in dead):
            event = self._note(func, name, dead)
            event.slot = slot
            event.record = capture(ins, out, [t for t, lost in dead if lost])
        for tensor, lost in dead:
            through = cuts | (event.bit if event and lost else 0)
            key = labels.key(tensor)
            if key in homes and key not in self.written:
                labels.add_own_cuts(tensor, through)
                if event and lost:
                    self.aliases.setdefault(key, []).append(event)
            elif labels.values(tensor):
                labels.add_values(tensor, 0, through)

    def _note(self, func: Any, name: str, dead: Sequence[tuple[Tensor | None, int]], kind: str | None = None) -> Event:
        site, at, lost = frames.locate(), None, 0
        for _, label in dead:
            lost |= label
        kind = kind or kinds.of_cut(func, name, next(tensor for tensor, label in dead if label))
        if kind == "no_grad":
            kind, at, site = self.switch.kind, site.user, self.switch.site or site
            site = Site(site.user, site.inside, frames.locate().callers)
        bit = 1 << len(self.trace.cuts)
        event = Event(kind, kinds.describe(func, name, kind), site, lost, self.calls, bit, at)
        self.trace.cuts.append(event)
        return event

    def look_for_unseen(self, tensors: list[Tensor]) -> None:
        """Note a cut for what arrives dead though no operation was seen to lose it."""
        labels = self.labels
        for tensor in tensors:
            missing = labels.values(tensor) & labels.trainable & ~labels.alive(tensor)
            missing &= ~self._lost_behind(labels.cuts(tensor))
            for event in self.aliases.get(labels.key(tensor), ()) if missing else ():
                # wrapped anew (as nn.Parameter(x.data) does), and so without the label
                labels.add_own_cuts(tensor, event.bit)
                missing &= ~event.lost
            if missing:
                event = self._note(None, "new leaf" if tensor.requires_grad else "unseen", [(None, missing)])
                labels.add_own_cuts(tensor, event.bit)

    def mark_continued(self, tensors: list[Tensor]) -> None:
        """Note that values which left tensors are also used as tensors: what left may have been for show."""
        for tensor in tensors:
            for event in self.sources.get(self.labels.key(tensor), ()) if self.sources else ():
                event.continues = True

    def _depart(self, name: str, slot: Slot, ins: list[Tensor], out: Any, values: int) -> None:
        kind = kinds.DEPARTURES[name]
        event = Event(kind, f"Tensor.{name}", frames.locate(), values, self.calls, slot=slot)
        event.record = capture(ins, out)
        self.trace.departures.append(event)
        self.sources.setdefault(self.labels.key(ins[0]), []).append(event)

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

    def _events_of(self, cuts: int) -> Iterator[Event]:
        return (event for event in self.trace.cuts if event.bit & cuts)

    def _lost_behind(self, cuts: int) -> int:
        if cuts not in self._lost_memo:
            self._lost_memo[cuts] = 0
            for event in self._events_of(cuts):
                self._lost_memo[cuts] |= event.lost
        return self._lost_memo[cuts]
