"""Complex numbers as pairs of real ones: a gradient of a real loss is then a gradient like any other."""

from __future__ import annotations

import torch
from torch import Tensor

# elements of a tensor that are summed at a time
CHUNK = 1 << 20


def real_parts(tensor: Tensor) -> Tensor:
    """The tensor itself, or a view of a complex one with its real and imaginary parts as a last dimension of two.

    torch's gradient of a complex z = x + iy is dL/dx + i dL/dy, so that Re(conj(g) v) is the product of these views.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def inner(one: Tensor, other: Tensor) -> float:
    """Real inner product of two tensors of one shape, summed in float64."""
    one, other = real_parts(one.detach()), real_parts(other.detach())
    if one.numel() <= CHUNK:
        return float((one.double() * other.double()).sum())
    parts = zip(one.reshape(-1).split(CHUNK), other.reshape(-1).split(CHUNK), strict=True)
    # a float64 copy of a large tensor is a copy too many
    return float(sum((a.double() * b.double()).sum() for a, b in parts))
