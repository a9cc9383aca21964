"""Prove at run time that a loss's gradient reaches the named parameters and is right, or name the line that cuts it.

    import qwen_fused as qf
    print(qf.prove(lambda: loss_of(model, batch), model, optimizer))

Five rungs are climbed: declared, connected, nonzero, correct, applied. See docs/proof.md for how each is judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof import applied, explain, rungs
from qwen_fused.proof.custom_ops import Surrogate
from qwen_fused.proof.cuts import CustomOp, Trace
from qwen_fused.proof.derivative import scales_of
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.ladder import RUNGS, ProofReport, name_some
from qwen_fused.proof.replay import Slot
from qwen_fused.proof.step import second_look, take_step
from qwen_fused.proof.subject import Gradients, Optimizers, Subject, as_float, check_scalar
from qwen_fused.proof.wrong import correct

# steps away from the given weights at which a zero gradient may come alive: what is zero still is zero for good
LOOKS = 3


def prove(
    loss_fn: Callable[[], Any],
    params: nn.Module | Mapping[str, Any],
    optimizer: Optimizers = None,
    *,
    allow: Iterable[str] = (),
    directions: int = 2,
    seed: int = 0,
    backward: Callable[[Tensor], Any] | None = None,
    step: Callable[[], Any] | None = None,
) -> ProofReport:
    """Prove that the gradient of a loss reaches parameters, is right, and moves them; or say where it is lost.

    Model, optimizer state, random state, modes and `.grad` are as before afterwards. How each rung is judged, and what
    can't be seen, is in docs/proof.md.

    Args:
        loss_fn: called without arguments, about fifteen times; returns the loss of one fixed batch, a 0-d tensor.
        params: a module, or a mapping of names to parameters or modules. Modules' buffers and modes are kept too.
        optimizer: a torch optimizer, or several; without one nothing is stepped, and the last rung is not asked.
        allow: what is intended: names of parameters that may go without gradient; of functions, files and lines where a
            value may lose it (a hard mask, a reward); of custom operations to take at their word. `*` and `?` are wild.
            An operation allowed never excuses a parameter that is left without any gradient: that takes the parameter's
            own name.
        directions: random directions along which finite differences are taken.
        seed: for the directions.
        backward: how the loop sends the loss back, default `loss.backward()`; a scaled loss is seen to be scaled.
        step: how the loop unscales, clips and steps, default each optimizer's `step()`.

    Returns:
        ProofReport; `.ok` only when every rung holds.

    Raises:
        ValueError: when `loss_fn` returns no scalar, or an argument is not of its kind.
        Exception: whatever `loss_fn`, `backward` or `step` raise on their own account is passed on.
    """
    if not isinstance(directions, int) or directions < 1:
        raise ValueError(f"directions must be a whole number of at least 1, got {directions!r}")
    started = time.perf_counter()
    subject = Subject(loss_fn, params, optimizer, allow, backward, step)
    try:
        report = _climb(subject, directions, seed)
    finally:
        subject.snapshot.restore()
    report.evaluations = subject.evaluations
    report.seconds = time.perf_counter() - started
    return report


def _climb(subject: Subject, directions: int, seed: int) -> ProofReport:
    ladder = [rungs.declared(subject)]
    subject.snapshot.clear_gradients()
    first = subject.trace()
    check_scalar(first.loss)
    loss = subject.call()
    gradients = subject.gradients(loss)
    step = take_step(subject, gradients, loss, first)
    rung, cut = rungs.connected(subject, first, gradients)
    ladder.append(rung)

    there = _Nearby(subject, gradients, first)
    subject.snapshot.reset_values()
    ladder.append(rungs.nonzero(subject, gradients, there.gradients.of, loss))
    there.return_to()
    surrogates = there.surrogates
    ladder.append(correct(subject, there.trace, there.gradients, there.loss, surrogates, directions, seed))
    subject.snapshot.reset_values()
    ladder.append(applied.applied(subject, step, gradients, first, there.trace))

    return ProofReport(
        rungs={name: rung for name, rung in zip(RUNGS, ladder, strict=True)},
        cut=cut,
        notes=_notes(subject, first, gradients),
        allowed=dict(subject.allow.matches),
        layers=rungs.layers(gradients.of),
        parameters=len(subject.named),
        loss=as_float(loss),
    )


class _Nearby:
    """A point a small random step away, where zeros and kinks of the given weights hide nothing, and its gradients.

    Parameters whose gradient is zero are left where they are, as a step of any optimizer would leave them: what is
    still zero after the others have moved stays zero. A zero-initialised adapter's other side comes alive.
    """

    def __init__(self, subject: Subject, gradients: Gradients, first: Trace):
        self.subject = subject
        scales = scales_of(subject.trainable)
        for look in range(LOOKS):
            alive_before = rungs.zeros(gradients.of)
            second_look(subject.trainable, gradients.of, scales)
            self.surrogates: dict[Slot, Surrogate] = {}
            self.trace: Trace = subject.trace(self._vouch, first)
            self.loss = self.trace.loss
            self.gradients = subject.gradients(self.loss)
            still_zero = [name for name in alive_before if name in rungs.zeros(self.gradients.of)]
            if not still_zero or len(still_zero) == len(alive_before) or look == LOOKS - 1:
                break
            gradients = self.gradients
        self._values = {name: p.data.clone() for name, p in subject.trainable.items()}

    def _vouch(self, op: CustomOp, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any) -> None:
        if self.subject.allow.custom(op.name, op.site.callers):
            self.surrogates[op.slot] = Surrogate(call, args, kwargs, out)

    def return_to(self) -> None:
        """Put the parameters back here."""
        for name, parameter in self.subject.trainable.items():
            parameter.data.copy_(self._values[name])


def _notes(subject: Subject, trace: Trace, gradients: Gradients) -> list[str]:
    """Cuts beside a way that does connect, and allowances that nothing needed."""
    labels = trace.labels
    alive = labels.alive(trace.loss) if isinstance(trace.loss, Tensor) else 0
    lines: dict[tuple[str, Frame], int] = {}
    for event in trace.reaching:
        partly = event.lost & alive
        if partly and not event.carried and not subject.allow.event(event):
            key = (event.operation, event.site.user)
            lines[key] = lines.get(key, 0) | partly
    notes = [
        f"one way to the loss is cut, another is not: {operation} at {frame} ({name_some(labels.names_of(label), 2)})"
        for (operation, frame), label in lines.items()
    ]
    returning = explain.returning(subject, trace, most=3) if alive == labels.trainable else []
    notes += [f"a value that left tensors comes back into the loss: {e.operation} at {e.site.user}" for e in returning]
    carried = [event for event in trace.reaching if event.carried]
    if carried and subject.own_backward:
        where = f"{carried[0].operation} at {carried[0].site.user}"
        notes.append(f"the gradient is carried past {where} by the backward that was given")
    if gradients.scale != 1 and not trace.half:
        why = ", though nothing is computed in 16 bits: is autocast on, and for this device?"
        notes.append(f"the loss is scaled by {gradients.scale:g} for backward{why if gradients.scale > 1 else ''}")
    if not torch.is_grad_enabled():
        notes.append("gradients were switched off where prove was called")
    notes += [f"allow entry {entry!r} matched nothing" for entry, count in subject.allow.matches.items() if not count]
    return notes


__all__ = ["ProofReport", "prove"]
