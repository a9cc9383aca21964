"""Checkpointed segments that compute something else when backward runs them again: other masks, a state gone on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch.utils.checkpoint

from qwen_fused.proof import frames
from qwen_fused.proof.frames import Site
from qwen_fused.proof.kept_state import overridden
from qwen_fused.proof.subject import Gradients, Subject


def without_checkpoints(subject: Subject) -> tuple[Gradients | None, list[Site]]:
    """Gradients with every segment kept in memory instead, and where the segments are; None where there are none."""
    sites: list[Site] = []

    def unchecked(*_: Any, **__: Any) -> Iterator[None]:
        sites.append(frames.locate())
        yield

    class Unchecked:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            sites.append(frames.locate())
            return function(*args)

    module = torch.utils.checkpoint
    with ExitStack() as stack:
        stack.enter_context(overridden(module, "_checkpoint_without_reentrant_generator", unchecked))
        stack.enter_context(overridden(module, "CheckpointFunction", Unchecked))
        loss = subject.call()
        found = subject.gradients(loss) if sites else None
    subject.snapshot.clear_gradients()
    return found, sites
