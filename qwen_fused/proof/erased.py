"""A gradient that backward delivered and that is gone when the optimizer comes to use it: the line that erased it."""

from __future__ import annotations

from typing import Any

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.frames import of_function
from qwen_fused.proof.hooks import hooks_of
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.ladder import Finding, name_some
from qwen_fused.proof.subject import Subject


def erased(subject: Subject, names: tuple[str, ...], during_step: bool) -> Finding:
    """Name the line that erased gradients, by doing backward and step once more with every call watched."""
    loss = subject.call()
    found: list[frames.Site] = []
    watched = subject.named[names[0]]

    def handler(func: Any, args: tuple, kwargs: dict) -> Any:
        held = watched.grad
        was = held is not None and bool(held.any())
        out = func(*args, **kwargs)
        concerned = kinds.name_of(func) == "grad.__set__" or any(True for _ in tensors_in((args, kwargs)))
        if was and not found and concerned and (watched.grad is None or not watched.grad.any()):
            found.append(frames.locate())
        return out

    subject.snapshot.clear_gradients()
    with modes.FunctionMode(handler):
        frames.boundary(subject.backward, loss)
        if during_step:
            subject.step()
    if during_step:
        subject.snapshot.reset_values()
        subject.snapshot.reset_optimizers()
    subject.snapshot.clear_gradients()
    when = "between backward and the optimizer's step" if during_step else "before backward was done"
    # no mode sees what a hook calls while backward runs
    hooks = hooks_of(watched) if not during_step else []
    frame = found[0].user if found else of_function(hooks[-1]) if hooks else None
    return Finding("erased", f"the gradient of {name_some(names)} is erased {when}", names, frame)
