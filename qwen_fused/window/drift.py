"""Whether prompts that are computed again come out as they were handed out; on CUDA without waiting for the device.

The same encode on the same data differs by rounding at most, where a pass with a graph and one without take other
kernels. How much that is depends on the narrowest type that encode computes in. A prompt may differ, relative to its
own norm, by

                 float64     float32     float16    bfloat16
    CPU          5.7e-14      3.1e-5      3.9e-3      2.0e-2
    elsewhere    4.5e-13      2.4e-4      3.9e-3      2.0e-2

A smaller change, of weights behind autograd's back or of what a key stands for, is not seen. On the CPU the two passes
mostly agree to the last bit; transformers' encoder layers, with a fused kernel where there is no graph, were 1.6e-7
apart in float32 and 3.4e-3 in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_nodes
from qwen_fused.common.device import to_host

# roundings of its type by which a prompt may differ; half precision adds up in float32 and rounds only then
ROUNDINGS = {torch.float64: 256.0, torch.float32: 256.0, torch.float16: 4.0, torch.bfloat16: 2.56}
# float32 is TF32 in places there, and a kernel is chosen by more than the shapes
ELSEWHERE = 8.0


class Drift:
    """Compares prompts with those computed again, and refuses what is too far apart."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, float, torch.cuda.Event]] = []
        # what encode computes in, by the type of its output and its autocast
        self.narrowest: dict[object, torch.dtype] = {}

    def compare(self, again: Tensor, before: Tensor, autocast: object = None) -> None:
        """Refuse prompts that differ, on CUDA at the next `raise_pending`: the step would have to wait for it.

        Args:
            again: [n, ...], with its graph.
            before: [n, ...], as it was handed out.
            autocast: what it was computed under.
        """
        key = (again.dtype, autocast)
        if key not in self.narrowest:
            self.narrowest[key] = narrowest_dtype(again)
        with torch.no_grad():
            change = relative_change(again, before)
        limit = bound(self.narrowest[key], again.device)
        if not change.is_cuda:
            refuse(change, limit)
            return
        host, arrived = to_host(change), torch.cuda.Event()
        arrived.record()
        self.pending.append((host, limit, arrived))

    def raise_pending(self) -> None:
        """Refuse what was found too far apart since the last call."""
        pending, self.pending = self.pending, []
        for change, limit, arrived in pending:
            arrived.synchronize()
            refuse(change, limit)


def bound(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative change that passes for rounding: the table at the head of this file."""
    limit = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    return limit * ELSEWHERE if device.type != "cpu" and dtype in (torch.float32, torch.float64) else limit


def narrowest_dtype(output: Tensor) -> torch.dtype:
    """The floating type of fewest bits that the graph behind the output computes in."""
    found = {output.dtype}
    for node in graph_nodes(output):
        found |= {metadata.dtype for metadata in getattr(node, "_input_metadata", ())}
    known = [dtype for dtype in ROUNDINGS if dtype in found]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=torch.bfloat16)


def relative_change(again: Tensor, before: Tensor) -> Tensor:
    """Largest |again - before| / |before| of a row; 0 where it was not finite before, Inf where it has become so."""
    # the vectors of one key are one prompt
    again, before = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (again, before))
    norm = torch.linalg.vector_norm(before, dim=1)
    # a prompt of next to nothing is measured by the others
    change = torch.linalg.vector_norm(again - before, dim=1) / norm.clamp_min(norm.mean() / 8).clamp_min(1e-30)
    return torch.where(norm.isfinite(), change.nan_to_num(torch.inf, torch.inf), 0.0).max()


def refuse(change: Tensor, limit: float) -> None:
    """Raise RuntimeError where prompts computed again are further from those handed out than rounding takes them."""
    if change > limit:
        raise RuntimeError(
            f"encode gives other prompts than it handed out, {change:.2g} of their norm apart where rounding explains "
            f"{limit:.2g}: its weights, its mode or what its keys stand for changed inside the window"
        )
