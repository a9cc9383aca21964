"""Prove at run time that a loss's gradient reaches the named parameters and is right, or name the line that cuts it.

    import qwen_fused as qf
    print(qf.prove(lambda: loss_of(model, batch), model, optimizer))

Five rungs are climbed: declared, connected, nonzero, correct, applied. See docs/proof.md for how each is judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qwen_fused.proof.applied import applied
from qwen_fused.proof.compiled import compare_compiled
from qwen_fused.proof.connected import connected
from qwen_fused.proof.correct import correct
from qwen_fused.proof.declared import declared
from qwen_fused.proof.enlarged import enlarged
from qwen_fused.proof.ladder import RUNGS, ProofReport, Rung
from qwen_fused.proof.nonzero import layers, nonzero
from qwen_fused.proof.notes import notes_of
from qwen_fused.proof.optimizers import Optimizers
from qwen_fused.proof.partial_cuts import weigh_partial_cuts
from qwen_fused.proof.perturbed import PerturbedPoint
from qwen_fused.proof.step import take_step
from qwen_fused.proof.subject import Subject, as_float
from qwen_fused.proof.trusted_ops import differentiate


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
    memory: int | None = None,
) -> ProofReport:
    """Prove that the gradient of a loss reaches parameters, is right, and moves them; or say where it is lost.

    Model, optimizer state, random state, modes and `.grad` are as before afterwards. How each rung is judged, and what
    can't be seen, is in docs/proof.md.

    Args:
        loss_fn: called without arguments, about fifteen times; returns the loss of one fixed batch, a 0-d tensor.
        params: a module, or a mapping of names to parameters or modules. Modules' buffers and modes are kept too.
        optimizer: a torch optimizer, or several; without one nothing is stepped, and the last rung is not asked.
        allow: what is intended: names of parameters that may go without gradient; of functions, files and lines where a
            value may lose it (a hard mask, a reward); of custom operations, or of the given backward or step, to take
            at their word. `*` and `?` are wild. An operation allowed never excuses a parameter that is left without any
            gradient: that takes the parameter's own name.
        directions: random directions along which finite differences are taken.
        seed: for the directions.
        backward: how the loop sends the loss back, default `loss.backward()`; a scaled loss is seen to be scaled.
        step: how the loop unscales, clips and steps, default each optimizer's `step()`.
        memory: bytes that the finite differences may take, as much as they need when None (a float32 copy of the
            parameters, and the largest one in float64 twice); with fewer they go layer by layer, with fewer still in
            the model's own precision, and the rung says which.

    Returns:
        ProofReport; `.ok` only when every rung holds.

    Raises:
        ValueError: when `loss_fn` returns no scalar, or an argument is not of its kind.
        Exception: whatever `loss_fn`, `backward` or `step` raise on their own account is passed on.
    """
    if not isinstance(directions, int) or directions < 1:
        raise ValueError(f"directions must be a whole number of at least 1, got {directions!r}")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be a number of bytes or None, got {memory!r}")
    started = time.perf_counter()
    subject = Subject(loss_fn, params, optimizer, allow, backward, step)
    try:
        report = _climb(subject, directions, seed, memory)
    finally:
        subject.snapshot.restore()
    report.evaluations = subject.evaluations
    report.seconds = time.perf_counter() - started
    return report


def _climb(subject: Subject, directions: int, seed: int, memory: int | None) -> ProofReport:
    subject.snapshot.clear_gradients()
    subject.snapshot.mark_attributes()
    first = differentiate(subject)
    subject.look_for_moving()
    step = take_step(subject, first.gradients, first.loss, first.trace, first.linearized)
    rung, cut = connected(subject, first.trace, first.gradients)

    near = PerturbedPoint(subject, first.gradients, first.trace, subject.after_first)
    subject.look_for_moving()
    ladder = [declared(subject, first.gradients.unregistered), rung]
    subject.snapshot.reset_values()
    later = near.at.gradients.of if near.at.gradients.error is None else None
    ladder.append(nonzero(subject, first.gradients, later, first.loss))
    by_layer = layers(first.gradients.of)
    first.gradients.forget()
    near.return_to()
    repeats = step is not None and step.repeats
    if first.gradients.error is not None:
        ladder.append(Rung("correct", None, "backward raised"))
    else:
        ladder.append(correct(subject, near.at, directions, seed, near.values, memory, repeats))
        near.return_to()
        compare_compiled(subject, near.at, ladder[3])
    weighed = weigh_partial_cuts(subject, near.at, ladder[1], near.values)
    subject.snapshot.reset_values()
    ladder.append(applied(subject, step, first.gradients, first.trace, near.at.trace))
    longer = enlarged(subject, step.enlarged) if step is not None and ladder[4].ok else None

    return ProofReport(
        rungs={name: rung for name, rung in zip(RUNGS, ladder, strict=True)},
        cut=cut,
        notes=notes_of(subject, first.trace, first.gradients, weighed),
        partial_cuts=weighed.cuts,
        enlarged=longer,
        allowed=dict(subject.allow.matches),
        layers=by_layer,
        parameters=len(subject.named),
        loss=as_float(first.loss),
    )


__all__ = ["ProofReport", "prove"]
