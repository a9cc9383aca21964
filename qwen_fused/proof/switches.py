"""Who switched gradients off: the with statement, the decorator or the call, while operations are met under it."""

from __future__ import annotations

import sys

import torch

from qwen_fused.proof import frames
from qwen_fused.proof.frames import Site


class GradientSwitch:
    """Kind and place of whatever switched gradients off last; leaving a block brings back whoever had before."""

    def __init__(self) -> None:
        self.kind = "no_grad"
        # switched off by somebody before the loss function: the nearest that can be said is who called
        self.site: Site | None = None if torch.is_grad_enabled() else frames.locate()
        self._blocks: dict[int, tuple[str, Site | None]] = {}

    def note(self, kind: str, enabled: bool) -> None:
        """Take down one switch, made two frames further out."""
        caller = sys._getframe(2)
        name, block = frames.context_manager(caller)
        if name == "__exit__":
            self.kind, self.site = self._blocks.pop(block, (self.kind, self.site))
            return
        self._blocks[block] = self.kind, self.site
        if torch.is_grad_enabled() and not enabled:
            by_decorator = frames.decorated(caller)
            self.kind = f"decorated {kind}" if by_decorator and kind == "no_grad" else kind
            self.site = by_decorator or frames.locate(caller)
