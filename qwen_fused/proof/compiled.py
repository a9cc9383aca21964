"""Compiled functions and modules: all else is judged by their source, and here their gradients are held against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.frames import Frame, of_function
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.moves import scales_of
from qwen_fused.proof.real_parts import inner
from qwen_fused.proof.subject import Subject, as_float
from qwen_fused.proof.trusted_ops import Point

# relative difference that is no other order of the same sums: in float32, and where anything was computed in 16 bits
CLOSE = {False: 1e-2, True: 1e-1}
# a parameter's difference over the largest gradient that is its rounding: a bias before a normalisation has no other
ROUNDING = {False: 1e-4, True: 1e-2}


def compare_compiled(subject: Subject, point: Point, correct: Rung) -> None:
    """Run one step as the caller's loop does; what compiled code gives other gradients is a fault of the fourth rung.

    Args:
        subject: what is proved, its parameters where the point is.
        point: the loss and its gradients by the source.
        correct: the fourth rung, which is told.
    """
    trace, eager = point.trace, point.gradients
    if not trace.compiled or trace.exchanges or trace.threads or eager.stepped or eager.error or not eager.of:
        return
    error: Exception | None
    try:
        loss = subject.call_compiled()
        compiled = subject.gradients(loss, compiled=True)
        error = compiled.error
    except Exception as raised:
        # dynamo, a backend, or a kernel's own check: all of them are what the caller's loop will meet
        error = raised
    finally:
        subject.snapshot.clear_gradients()
    if error is not None:
        said = str(error).strip().partition("\n")[0]
        _break(correct, trace.compiled, f"runs as source, and raises once it is compiled: {said}", tuple(eager.of))
        return
    close, before, now = CLOSE[trace.half], as_float(point.loss), as_float(loss)
    if not abs(now - before) <= close * abs(before) + 1e-6:
        if trace.draws:
            subject.note("compiled code draws other random numbers than its source: the two are not compared")
        else:
            _break(correct, trace.compiled, f"gives a loss of {now:.6g}, its source {before:.6g}", tuple(eager.of))
        return
    names = _apart(subject, eager.of, compiled.of, trace.half)
    if names and trace.draws:
        subject.note("compiled code may draw other random numbers than its source: the two are not compared")
    elif names:
        _break(correct, trace.compiled, f"gives another gradient of {name_some(names)} than its source", names)
    else:
        correct.detail += "; compiled code gives the same"


def _apart(subject: Subject, eager: dict[str, Tensor], compiled: dict[str, Tensor], half: bool) -> tuple[str, ...]:
    """Names of the gradients that differ by more than rounding."""
    scales = scales_of({name: subject.named[name] for name in eager})
    least = ROUNDING[half] * max(scales[name] * _norm(g) for name, g in eager.items())
    apart = []
    for name, gradient in eager.items():
        other = compiled.get(name, torch.zeros_like(gradient))
        difference = _norm(other - gradient)
        if not (difference <= CLOSE[half] * _norm(gradient) or scales[name] * difference <= least):
            apart.append(name)
    return tuple(apart)


def _norm(gradient: Tensor) -> float:
    return inner(gradient, gradient) ** 0.5


def _break(correct: Rung, functions: list[Any], what: str, names: tuple[str, ...]) -> None:
    function = next((f for f in functions if f is not None), None)
    # of a module it is the method that calls its forward
    module = getattr(function, "__self__", None)
    frame: Frame | None = of_function(getattr(module, "forward", function))
    called = type(module).__name__ if module is not None else getattr(function, "__qualname__", "a compiled function")
    detail = f"{called}, compiled, {what}"
    correct.ok = False
    correct.detail += f"; {detail}"
    correct.findings.append(Finding("compiled", detail, names, frame))
