"""Per-group gradient norms in plain torch: the spec of csrc/norms/, and what runs where they are not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(grads: Sequence[Tensor]) -> None:
    """Refuse what no path can measure, naming the gradient."""
    for place, grad in enumerate(grads):
        if grad.layout != torch.strided:
            raise ValueError(f"gradient {place} must be dense, got layout {grad.layout}")
        if grad.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"gradient {place} must be float16, bfloat16, float32 or float64, got {grad.dtype}")
        if grad.device != grads[0].device:
            raise ValueError(
                f"gradients must share one device: gradient 0 is on {grads[0].device}, "
                f"gradient {place} on {grad.device}"
            )


def check_apart(grads: Sequence[Tensor]) -> None:
    """Refuse to scale gradients that share memory, as csrc/common/apart.h does; `grads` are the ones to be scaled."""
    spans = []
    for place, grad in enumerate(grads):
        # others have no address of their own
        if type(grad) not in (Tensor, torch.nn.Parameter) or grad.is_meta or grad.numel() == 0:
            continue
        axes = sorted((step, size) for step, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)
        reached = 0
        for step, size in axes:
            if step <= reached:
                raise ValueError(
                    f"gradient {place} must not overlap itself to be scaled, got shape {tuple(grad.shape)} of strides "
                    f"{grad.stride()}"
                )
            reached += step * (size - 1)
        dense = reached + 1 == grad.numel()
        spans.append((grad.data_ptr(), grad.nbytes if dense else 1, place))
    end, last = 0, 0
    for begin, size, place in sorted(spans):
        if begin < end:
            raise ValueError(
                f"gradients must lie in memory of their own to be scaled, got {min(last, place)} and "
                f"{max(last, place)} in the same"
            )
        if begin + size > end:
            end, last = begin + size, place


def _norm(parts: Tensor) -> Tensor:
    """L2 norm that leaves the range only when its result does, as hypot; Inf and NaN as the elements have them."""
    if parts.numel() == 0:
        return parts.new_zeros(())
    largest = parts.abs().amax()
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    norm = scale * torch.linalg.vector_norm(parts / scale)
    return torch.where(largest.isfinite(), norm, largest)


def _places(position: Sequence[int], device: torch.device) -> Tensor:
    """[len(position)] int64, filled in on the device: a copy's source on the host is gone when a graph is replayed."""
    starts = [n for n in range(len(position)) if n == 0 or position[n] != position[n - 1] + 1]
    runs = zip(starts, [*starts[1:], len(position)], strict=True)
    return torch.cat([torch.arange(position[a], position[a] + b - a, device=device) for a, b in runs])


def measure(
    grads: Sequence[Tensor],
    rows: Sequence[int],
    position: Sequence[int],
    inv_scale: float,
    inv_scale_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the op group_grad_norm in csrc/ops.cpp: returns values [3, R] and counts [2, R], without a host sync."""
    check(grads)
    device = grads[0].device
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    zero = torch.zeros((), dtype=torch.float64, device=device)
    norms, maxima, bad = [zero], [zero], [zero.long()]
    for grad in grads:
        # squares of float32 and narrower fit float64
        wide = grad.double()
        norms.append(_norm(wide))
        maxima.append(wide.abs().amax() if grad.numel() else zero)
        bad.append((~grad.isfinite()).sum())
    norm, max_abs, nonfinite = torch.stack(norms[1:]), torch.stack(maxima[1:]), torch.stack(bad[1:])

    scale = torch.full((), inv_scale, dtype=torch.float64, device=device)
    if inv_scale_tensor is not None:
        scale = scale * inv_scale_tensor.reshape(()).to(device)
    places = _places(position or range(len(grads)), device)
    none = torch.iinfo(torch.int64).max
    columns = []
    for begin, end, base in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        bad_here = nonfinite[begin:end]
        first = torch.where(bad_here > 0, places[begin:end] - base, none)
        first = first.amin() if end > begin else torch.full((), none, device=device)
        largest = max_abs[begin:end].amax() if end > begin else zero
        norm_here = _norm(norm[begin:end]) * scale.abs()
        columns.append((norm_here, largest * scale.abs(), bad_here.sum(), torch.where(first == none, -1, first)))
    rows_of = [torch.stack(kind) for kind in zip(*columns, strict=True)]
    values = torch.stack([rows_of[0], rows_of[1], scale.expand_as(rows_of[0])]).to(dtype)
    return values, torch.stack([rows_of[2], rows_of[3]])


def clip_(
    grads: Sequence[Tensor],
    rows: Sequence[int],
    values: Tensor,
    max_norm: Sequence[float],
    bounds: Tensor | None = None,
) -> None:
    """As the op group_grad_clip_ in csrc/ops.cpp, except that it writes where the factor is one too."""
    check(grads)
    if not torch.compiler.is_compiling():
        check_apart(grads[min(rows[0::3], default=0) : max(rows[1::3], default=0)])
    if bounds is None:
        bounds = torch.stack([values.new_full((), bound, dtype=torch.float64) for bound in max_norm])
    bounds = torch.where(bounds < 0, torch.nan, bounds)
    norm, _, inv_scale = values[:, : len(bounds)].double()
    ratio = torch.where(bounds.isinf(), torch.ones_like(norm), (bounds / (norm + 1e-6)).clamp(max=1.0))
    for factor, begin, end in zip((ratio * inv_scale).unbind(), rows[0::3], rows[1::3], strict=True):
        for grad in grads[begin:end]:
            # 0-d float64 factors do not widen the product
            grad.mul_(factor)
