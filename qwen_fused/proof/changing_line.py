"""The line at which a gradient is changed between its delivery and its use: both are done once more, and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.real_parts import norm
from qwen_fused.proof.subject import Subject


def changing_line(
    subject: Subject, parameter: Tensor, did: Callable[[float, float], bool], during_step: bool
) -> Frame | None:
    """The first call, of a backward and perhaps a step that are done once more, that did something to a gradient.

    Args:
        subject: what is proved.
        parameter: whose gradient is looked at.
        did: told the gradient's length before and after a call, 0 where there is none.
        during_step: whether to step too; parameters and optimizers are put back.

    Returns:
        The line; None where no call did it: no mode sees what a hook calls while backward runs.
    """
    loss = subject.call()
    found: list[Frame] = []

    def handler(func: Any, args: tuple, kwargs: dict) -> Any:
        name = kinds.name_of(func)
        concerned = name == "grad.__set__" or (name != "backward" and any(True for _ in tensors_in((args, kwargs))))
        if found or not concerned:
            return func(*args, **kwargs)
        before = _length(parameter.grad)
        out = func(*args, **kwargs)
        if did(before, _length(parameter.grad)):
            found.append(frames.locate().user)
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
    return found[0] if found else None


def undoing_line(subject: Subject, parameter: Tensor) -> Frame | None:
    """The call, of a step that is done once more, that puts a parameter back to what it was before the step."""
    loss = subject.call()
    subject.snapshot.clear_gradients()
    frames.boundary(subject.backward, loss)
    before = parameter.detach().clone()
    moved = False
    found: list[Frame] = []

    def handler(func: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal moved
        out = func(*args, **kwargs)
        if not found and not torch.equal(parameter.data, before):
            moved = True
        elif moved and not found:
            found.append(frames.locate().user)
        return out

    with modes.FunctionMode(handler):
        subject.step()
    subject.snapshot.reset_values()
    subject.snapshot.reset_optimizers()
    subject.snapshot.clear_gradients()
    return found[0] if found else None


def _length(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else norm([gradient])
