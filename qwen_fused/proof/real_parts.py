"""Complex numbers as pairs of real ones: a gradient of a real loss is then a gradient like any other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# elements that are summed in float32
ROW = 1024


def real_parts(tensor: Tensor) -> Tensor:
    """The tensor itself, or a view of a complex one with its real and imaginary parts as a last dimension of two.

    torch's gradient of a complex z = x + iy is dL/dx + i dL/dy, so that Re(conj(g) v) is the product of these views.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def inner(one: Tensor, other: Tensor) -> float:
    """Real inner product of two tensors of one shape, summed in float64."""
    one, other = real_parts(one.detach()), real_parts(other.detach())
    if one.dtype == other.dtype == torch.float32 and one.numel() >= ROW:
        # short float32 sums, added up in float64: a float64 copy of a large tensor is a copy too many
        one, other = one.reshape(-1), other.reshape(-1)
        whole = one.numel() // ROW * ROW
        rows = torch.linalg.vecdot(one[:whole].view(-1, ROW), other[:whole].view(-1, ROW))
        return float(rows.double().sum()) + float((one[whole:].double() * other[whole:].double()).sum())
    return float((one.double() * other.double()).sum())


def norm(tensors: Iterable[Tensor]) -> float:
    """Length of all the tensors together, sparse ones too, in float32 at least."""
    parts = [real_parts(t.detach().to_dense() if t.is_sparse else t.detach()) for t in tensors]
    # squares of float16 overflow in float16 itself
    wide = [None if t.dtype in (torch.float32, torch.float64) else torch.float32 for t in parts]
    return sum(float(torch.linalg.vector_norm(t, dtype=w)) ** 2 for t, w in zip(parts, wide, strict=True)) ** 0.5
