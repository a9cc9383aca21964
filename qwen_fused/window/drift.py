"""Whether prompts that are computed again come out as they were handed out; on CUDA without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.common.device import to_host

# share by which a recomputed prompt may differ from the one handed out: rounding is far below, another dropout mask,
# another mode or other data for the same key far above
DRIFT = 0.02


class Drift:
    """Compares prompts with those computed again, and refuses what is too far apart."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def compare(self, again: Tensor, before: Tensor) -> None:
        """Refuse prompts that differ, on CUDA at the next `settle`: the step would have to wait for the comparison."""
        with torch.no_grad():
            drift = torch.linalg.vector_norm(again - before) / torch.linalg.vector_norm(before)
        if not drift.is_cuda:
            refuse(drift)
            return
        host, arrived = to_host(drift), torch.cuda.Event()
        arrived.record()
        self.pending.append((host, arrived))

    def settle(self) -> None:
        """Refuse what was found too far apart since the last call."""
        for drift, arrived in self.pending:
            arrived.synchronize()
            refuse(drift)
        self.pending.clear()


def refuse(drift: Tensor) -> None:
    """Raise RuntimeError where prompts computed again are too far from those handed out."""
    if drift > DRIFT:
        raise RuntimeError(
            f"encode gives other prompts than it handed out, {100 * drift:.0f} % apart: its weights, its mode or "
            f"what its keys stand for changed inside the window"
        )
