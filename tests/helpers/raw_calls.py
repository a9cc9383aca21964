"""Tensors of any strides, and strange ones, for calls of the compiled ops past every public function.

QWEN_FUSED_RAW_CALLS=20000 HYPOTHESIS_PROFILE=search makes a long run of them, with examples never drawn before.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

CALLS = int(os.environ.get("QWEN_FUSED_RAW_CALLS", "150"))
LONG = settings(max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
EXTREMES = (0.0, -1e30, 1e30, float("inf"), float("-inf"), float("nan"))
STRANGE = ("dtype", "fewer", "more", "empty", "scalar", "sparse", "meta", "nested", "zero", "extreme")


def laid_out(draw, x: Tensor) -> Tensor:
    """The same numbers under strides of any kind."""
    kind = draw(st.sampled_from(["as it is", "permuted", "sliced", "reversed axes", "negated", "expanded"]))
    if x.dim() == 0 or kind == "as it is":
        return x
    if kind == "permuted":
        order = draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute([order.index(k) for k in range(x.dim())])
    if kind == "sliced":
        axis = draw(st.integers(0, x.dim()))
        return torch.stack([x, x], axis).select(axis, 1)
    if kind == "reversed axes":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if kind == "negated":
        # the sign is in a flag of the tensor, not in its memory
        return torch._neg_view(-x)
    return x[:1].expand_as(x)


def spoiled(draw, x: Tensor, kinds: tuple[str, ...] = STRANGE) -> Tensor | None:
    """One thing wrong, or strange, with a tensor."""
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    if kind == "dtype":
        return x.to(draw(st.sampled_from(OTHERS)))
    if kind == "fewer":
        return x[:1] if x.dim() else x
    if kind == "more":
        return x[None]
    if kind == "empty":
        return x.new_empty(0)
    if kind == "scalar":
        return x.new_zeros(())
    if kind == "sparse" and x.dim():
        return x.to_sparse()
    if kind == "meta":
        return x.to("meta")
    if kind == "nested" and x.dim() > 1 and x.shape[0]:
        return torch.nested.nested_tensor(list(x))
    if kind == "zero":
        # zeros that have no memory
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    if kind == "extreme" and x.numel() and x.is_floating_point():
        # its own storage, in order: a stride of 0 can't be written to, and a permuted one has no flat view
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(EXTREMES))
    return x
