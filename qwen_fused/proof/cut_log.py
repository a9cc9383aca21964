"""The cuts of one call as they are met: what an operation lost, what left tensors, and what is behind what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof import frames, kinds
from qwen_fused.proof.cuts import Event, Trace
from qwen_fused.proof.frames import Site
from qwen_fused.proof.labels import Key, Labels, tensors_in
from qwen_fused.proof.reducers import processes
from qwen_fused.proof.replay import Gathered, capture
from qwen_fused.proof.slots import Collectives, Slot
from qwen_fused.proof.switches import GradientSwitch


class CutLog:
    """Compares what went into a call with what came out, and keeps what was lost.

    Args:
        labels: of every tensor met.
        trace: where cuts and departures are listed.
    """

    def __init__(self, labels: Labels, trace: Trace):
        self.labels = labels
        self.trace = trace
        self.calls = 0  # made so far
        self.written: set[Key] = set()  # storages that the present call wrote to
        self.switch = GradientSwitch()
        self.collectives = Collectives()
        self._aliases: dict[Key, list[Event]] = {}
        self._sources: dict[Key, list[Event]] = {}
        # the last write of living values to each storage: made through an alias, autograd may not know of it
        self._writes: dict[Key, Event] = {}
        self._lost_memo: dict[int, int] = {}
        self._stops: dict[int, int] = {}

    def switch_parameter(self, func: Any, name: str, tensor: Tensor, args: tuple, kwargs: dict) -> Any:
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
            labels.add_own_cuts(tensor, self.note(func, name, [(tensor, alive)], "requires_grad").bit)
        return out

    def lose(self, func: Any, name: str, slot: Slot, ins: list[Tensor], out: Any, alive: int, cuts: int) -> None:
        """Compare what went in alive with what came out, note a cut, and hand the cuts on."""
        labels = self.labels
        homes = {labels.key(tensor) for tensor in ins}
        results = list(tensors_in(out))
        for key in self.written:
            for alias in self._aliases.get(key, ()):
                alias.aliased = True
            if alive:
                written = f"a write by {kinds.describe(func, name, '')} through another tensor of the same memory"
                self._writes[key] = Event("data", written, frames.locate(), alive, self.calls)
        results += [t for t in ins if labels.key(t) in self.written and not any(t is r for r in results)]
        dead = [(t, alive & labels.values(t) & ~labels.alive(t)) for t in results]
        event: Event | None = None
        if any(lost for _, lost in dead):
            event = self.note(func, name, dead)
            event.slot = slot
            event.record = capture(ins, out, [t for t, lost in dead if lost])
        if cuts and event is None and (name in kinds.STOPS or not torch.is_grad_enabled()):
            cuts |= self._stop(cuts)
        for tensor, lost in dead:
            through = cuts | (event.bit if event and lost else 0)
            key = labels.key(tensor)
            if key in homes and key not in self.written:
                labels.add_own_cuts(tensor, through)
                if event and lost:
                    self._aliases.setdefault(key, []).append(event)
            elif labels.values(tensor):
                labels.add_values(tensor, 0, through)

    def _stop(self, cuts: int) -> int:
        """Note that somebody wrote down that nothing is expected of what lies behind cuts which nobody wrote down."""
        if cuts not in self._stops:
            silent = [e for e in self._events_of(cuts) if e.lost and e.kind not in kinds.WRITTEN]
            known = [e for e in self._events_of(cuts) if e.stops]
            self._stops[cuts] = 0
            if any(not any(stop.stops & e.bit for stop in known) for e in silent):
                stop = Event("detach", "a stop", frames.locate(), 0, self.calls, stops=sum(e.bit for e in silent))
                self._stops[cuts] = self._listed(stop, 0).bit
        return self._stops[cuts]

    def collective(self, func: Any, args: tuple, values: int, cuts: int, *, inside: bool) -> None:
        """Hand labels on to what processes exchange, and note what autograd is not told of.

        The first argument of each is written to: with what others sent, which carries no gradient back to them.

        Args:
            func: the operation.
            args: its arguments.
            values, cuts: labels of all of them together.
            inside: whether a custom Function calls it, whose backward is then its author's.
        """
        labels, slot = self.labels, self.collectives.next()
        self.trace.exchanges |= processes() > 1
        targets = list(tensors_in(args[0] if args else ()))
        sources = list(tensors_in(args)) if not inside else []
        living, arriving = 0, 0
        for tensor in sources:
            arriving |= labels.alive(tensor)
        for tensor in targets:
            # over what carries a gradient: autograd goes on as if nothing had been written
            living |= labels.alive(tensor) if labels.key(tensor) in {labels.key(t) for t in sources} else 0
        bit = 0
        if arriving:
            kind = "collective in place" if living else "collective"
            event = Event(kind, kinds.collective_name(func), frames.locate(), arriving, self.calls)
            event = self._listed(event, arriving)
            bit = event.bit
            if not living:
                event.slot, event.record = slot, Gathered([tensor.detach().clone() for tensor in targets])
        for tensor in targets:
            labels.created.add(labels.key(tensor))
            labels.add_values(tensor, values, cuts | bit)

    def note(self, func: Any, name: str, dead: Sequence[tuple[Tensor | None, int]], kind: str | None = None) -> Event:
        """Take down a cut made by the present call, given its results and the labels that each lost."""
        site, at, lost = frames.locate(), None, 0
        for _, label in dead:
            lost |= label
        kind = kind or kinds.of_cut(func, name, next(tensor for tensor, label in dead if label))
        if kind == "no_grad":
            kind, at, site = self.switch.kind, site.user, self.switch.site or site
            site = Site(site.user, site.inside, frames.locate().callers)
        return self._listed(Event(kind, kinds.describe(func, name, kind), site, lost, self.calls, at=at), lost)

    def _listed(self, event: Event, lost: int) -> Event:
        """The event as the next of the cuts, with a label of its own."""
        event = dataclasses.replace(event, lost=lost, bit=1 << len(self.trace.cuts))
        self.trace.cuts.append(event)
        return event

    def explain_aliases(self, loss: Tensor) -> None:
        """Where labels say that the loss is connected and its graph says it isn't: note a write through an alias.

        Labels of what is alive lie on storages, which the tensor written through shares with the one that is used.
        """
        labels = self.labels
        claimed = labels.alive(loss) & ~labels.reached_from(loss) & ~self.lost_behind(labels.cuts(loss))
        for written in sorted(self._writes.values(), key=lambda event: -event.order) if claimed else ():
            if written.lost & claimed:
                labels.add_own_cuts(loss, self._listed(written, written.lost & claimed).bit)
                claimed &= ~written.lost

    def look_for_unseen(self, tensors: list[Tensor]) -> None:
        """Note a cut for what arrives dead though no operation was seen to lose it."""
        labels = self.labels
        for tensor in tensors:
            missing = labels.values(tensor) & labels.trainable & ~labels.alive(tensor)
            missing &= ~self.lost_behind(labels.cuts(tensor))
            for event in self._aliases.get(labels.key(tensor), ()) if missing else ():
                # wrapped anew (as nn.Parameter(x.data) does), and so without the label
                labels.add_own_cuts(tensor, event.bit)
                missing &= ~event.lost
            written = self._writes.get(labels.key(tensor)) if missing else None
            if written is not None and written.lost & missing:
                event = self._listed(written, written.lost & missing)
                labels.add_own_cuts(tensor, event.bit)
                missing &= ~event.lost
            if missing:
                event = self.note(None, "new leaf" if tensor.requires_grad else "unseen", [(None, missing)])
                labels.add_own_cuts(tensor, event.bit)

    def mark_continued(self, tensors: list[Tensor]) -> None:
        """Note that values which left tensors are also used as tensors: what left may have been for show."""
        for tensor in tensors:
            for event in self._sources.get(self.labels.key(tensor), ()) if self._sources else ():
                event.continues = True

    def depart(self, name: str, slot: Slot, ins: list[Tensor], out: Any, values: int) -> None:
        """Take down a value that leaves tensors."""
        kind = kinds.DEPARTURES[name]
        event = Event(kind, f"Tensor.{name}", frames.locate(), values, self.calls, slot=slot)
        event.record = capture(ins, out)
        self.trace.departures.append(event)
        self._sources.setdefault(self.labels.key(ins[0]), []).append(event)

    def _events_of(self, cuts: int) -> Iterator[Event]:
        return (event for event in self.trace.cuts if event.bit & cuts)

    def lost_behind(self, cuts: int) -> int:
        """Labels of all that these cuts lost, together."""
        if cuts not in self._lost_memo:
            self._lost_memo[cuts] = 0
            for event in self._events_of(cuts):
                self._lost_memo[cuts] |= event.lost
        return self._lost_memo[cuts]
