"""A training step that computes its loss and sends it back in one call, taken apart for `prove` at that very place.

`loss` runs the step up to where it sends its loss back, and takes the loss. `backward` runs it once more and lets it
send, in place of its own loss, the one that `prove` holds; whatever the step does before and after happens as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.kept_state import overridden


class _Sent(BaseException):
    """Leaves a step at the place where it sends its loss back; no `except Exception` holds it."""

    def __init__(self, loss: Any):
        self.loss = loss


class SplitStep:
    """The step of one or more micro-batches, as the two functions that `prove` asks for.

    Args:
        runs: one per micro-batch; each computes a loss and sends it back.
        owner: what the loop sends losses back with, an Accelerator for example.
        method: name of the method of `owner` that does it, taking the loss first.
        entering: given the micro-batch's number, what to run it under.
    """

    def __init__(
        self,
        runs: Sequence[Callable[[], Any]],
        owner: Any,
        method: str = "backward",
        entering: Callable[[int], AbstractContextManager] = lambda number: nullcontext(),
    ):
        self.runs = runs
        self.owner = owner
        self.method = method
        self.entering = entering
        self.sent = 0  # losses that the last run sent back

    def loss(self) -> Any:
        """The micro-batches' losses, added up."""
        losses = []
        for number, run in enumerate(self.runs):
            with self.entering(number):
                losses.append(self._until_sent(run))
        return losses[0] if len(losses) == 1 else sum(losses)

    def backward(self, loss: Tensor) -> None:
        """Run every micro-batch's step with an equal part of this loss in place of its own."""
        for number, run in enumerate(self.runs):
            part = loss if len(self.runs) == 1 else loss / len(self.runs)
            with self.entering(number):
                self._sending(run, part, keep_graph=number + 1 < len(self.runs))

    def _until_sent(self, run: Callable[[], Any]) -> Any:
        def leave(loss: Any, *_: Any, **__: Any) -> None:
            raise _Sent(loss)

        with overridden(self.owner, self.method, leave), overridden(torch.autograd, "backward", leave):
            try:
                run()
            except _Sent as sent:
                return sent.loss
        raise ValueError("the training step came to its end without sending a loss back")

    def _sending(self, run: Callable[[], Any], part: Tensor, keep_graph: bool) -> None:
        send, autograd = getattr(self.owner, self.method), torch.autograd.backward
        self.sent = 0
        inside = False

        def through_owner(_: Any, *args: Any, **more: Any) -> Any:
            nonlocal inside
            self.sent += 1
            if self.sent > 1:
                return None
            inside = True
            try:
                return send(part, *args, **more)
            finally:
                inside = False

        def directly(loss: Any, seeds: Any = None, keep: bool | None = None, *args: Any, **more: Any) -> None:
            self.sent += not inside
            if self.sent == 1:
                autograd(loss if inside else part, seeds, keep_graph or keep, *args, **more)

        with overridden(self.owner, self.method, through_owner), overridden(torch.autograd, "backward", directly):
            run()
