"""Calls that draw from a random generator: made again, they draw the same, and the generator stands where it stood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.random_state import RandomState
from qwen_fused.proof.slots import Slot


@dataclass
class Draw:
    """Generators around a call that drew from them: in another type the same call would draw otherwise, or more."""

    before: RandomState
    after: RandomState
    own: tuple[torch.Generator, Tensor, Tensor] | None = None  # one that was named, its states before and after

    def again(self, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Make the call from the generators' states of then, and leave them where it left them then."""
        self.before.put_back()
        if self.own:
            self.own[0].set_state(self.own[1])
        out = call(*args, **kwargs)
        self.after.put_back()
        if self.own:
            self.own[0].set_state(self.own[2])
        return out


def watch_draw(draws: dict[Slot, Draw], func: Any, name: str, slot: Slot, args: tuple, kwargs: dict) -> Any:
    """Make the call, and take down the generators around it where it draws from them."""
    if name.endswith("__"):
        return func(*args, **kwargs)
    own = kwargs.get("generator")
    states = own.get_state() if isinstance(own, torch.Generator) else None
    before = RandomState.now()
    out = func(*args, **kwargs)
    after = RandomState.now()
    if isinstance(own, torch.Generator) and states is not None:
        draws[slot] = Draw(before, after, (own, states, own.get_state()))
    elif after != before:
        draws[slot] = Draw(before, after)
    return out
