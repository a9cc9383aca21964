"""Hooks that a loss function registers on its tensors: left out one by one, to find the one that changes a gradient."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.frames import Frame, Site
from qwen_fused.proof.subject import Gradients, Subject

# hooks that are left out alone, each at the cost of one step
TRIED = 8


@dataclass(frozen=True)
class Hook:
    """Where a hook was registered, and where it was defined, if that has a source."""

    site: Site
    frame: Frame | None

    @property
    def name(self) -> str:
        """What it is: "the hook train.py:12 in halve", or "a hook"."""
        return "a hook" if self.frame is None else f"the hook {self.frame}"


def hooks_of(parameter: Tensor) -> list[Callable[..., Any]]:
    """Hooks that may change a parameter's gradient."""
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]


def hook_to_blame(subject: Subject, is_mended: Callable[[Gradients], bool]) -> Hook | None:
    """The first hook on a tensor of the loss function's own without which the gradients are mended.

    Args:
        subject: what is proved.
        is_mended: whether the gradients of a step without the hook are as they should be.
    """
    hooks: list[Hook] = []
    if not is_mended(gradients_without(subject, lambda number, hook: True, hooks)):
        return None
    for number, hook in enumerate(hooks[:TRIED]):

        def is_this(other: int, _: Hook, number: int = number) -> bool:
            return other == number

        if is_mended(gradients_without(subject, is_this, [])):
            return hook
    # several of them together
    return hooks[0]


def gradients_without(subject: Subject, is_left_out: Callable[[int, Hook], bool], hooks: list[Hook]) -> Gradients:
    """Gradients of one step without some of the loss function's own hooks; all hooks are listed."""

    def call(func: Any, args: tuple, kwargs: dict) -> Any:
        if kinds.name_of(func) != "register_hook":
            return func(*args, **kwargs)
        hook = Hook(frames.locate(), frames.of_function(args[1] if len(args) > 1 else kwargs.get("hook")))
        hooks.append(hook)
        return RemovableHandle(OrderedDict()) if is_left_out(len(hooks) - 1, hook) else func(*args, **kwargs)

    with modes.uncompiled(), modes.FunctionMode(call):
        loss = subject.call()
    found = subject.gradients(loss)
    subject.snapshot.clear_gradients()
    return found
