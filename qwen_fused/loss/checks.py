"""What the public losses ask of their arguments; a complaint names the argument, what was expected and what came."""

from __future__ import annotations

import os
import sys
from numbers import Real

import torch
from torch import Tensor

from qwen_fused.kernels.reference import HARD_MODES

MAX_CLASSES = 64
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST = sys.float_info.max

check_targets = os.environ.get("QWEN_FUSED_CHECK_TARGETS") == "1"


def set_check_targets(enabled: bool) -> None:
    """Look for targets out of range on every device, at the price of a host sync per call.

    For debugging: on CUDA a target out of range otherwise makes the loss NaN, and nothing says which cell it was.
    QWEN_FUSED_CHECK_TARGETS=1 in the environment has the same effect from the start.

    Args:
        enabled: whether to look.
    """
    global check_targets
    check_targets = enabled


def check_dense(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_plan(plan: Tensor, target: Tensor) -> None:
    check_dense("plan_logits", plan)
    check_dense("target", target)
    if plan.dim() != 5:
        raise ValueError(f"plan_logits must be [B, T, C, H, W], got {tuple(plan.shape)}")
    if plan.dtype not in FLOAT_DTYPES:
        raise ValueError(f"plan_logits must be float16, bfloat16, float32 or float64, got {plan.dtype}")
    B, T, C, H, W = plan.shape
    if T < 1:
        raise ValueError(f"plan_logits must have at least one step T, got {tuple(plan.shape)}")
    if not 1 <= C <= MAX_CLASSES:
        raise ValueError(f"plan_logits must have 1 to {MAX_CLASSES} classes, got C = {C} in {tuple(plan.shape)}")
    if target.shape != (B, H, W):
        raise ValueError(f"target must be [B, H, W] = {(B, H, W)}, got {tuple(target.shape)}")
    if target.dtype not in INTEGER_DTYPES:
        raise ValueError(f"target must have an integer dtype, got {target.dtype}")
    if target.device != plan.device:
        raise ValueError(f"target must be on {plan.device} like plan_logits, got {target.device}")


def check_flat(logits: Tensor, target: Tensor) -> None:
    """Check what the cross-entropy alone is given."""
    check_dense("logits", logits)
    check_dense("target", target)
    shape, flat = logits.shape, logits.dim() == 2
    if not flat and logits.dim() != 4:
        raise ValueError(f"logits must be [N, C] or [B, C, H, W], got {tuple(shape)}")
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if not 1 <= shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits must have 1 to {MAX_CLASSES} classes, got C = {shape[1]} in {tuple(shape)}")
    if target.shape != (shape[:1] if flat else shape[:1] + shape[2:]):
        expected = "[N]" if flat else "[B, H, W]"
        raise ValueError(f"target must be {expected} for logits of shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.dtype not in INTEGER_DTYPES:
        raise ValueError(f"target must have an integer dtype, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target must be on {logits.device} like logits, got {target.device}")


def check_float(
    name: str, x: Tensor | None, shape: tuple[int, ...], axes: str, plan: Tensor, *, grad: bool = True
) -> None:
    """Check an optional float argument; `grad=False` refuses one whose gradient would be lost."""
    if x is None:
        return
    check_dense(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device != plan.device:
        raise ValueError(f"{name} must be on {plan.device} like plan_logits, got {x.device}")
    if not grad and x.requires_grad:
        raise ValueError(f"{name} must not require grad, as no gradient flows to it, got requires_grad=True")


def check_weight(name: str, weight: float) -> None:
    """Refuse a term's weight that is no cost: below 0 the optimizer would drive the term up without end."""
    if not isinstance(weight, Real) or not 0 <= weight <= LARGEST:
        raise ValueError(f"weights.{name} must be a finite number of at least 0, got {weight!r}")


def check_options(hard_floor: float, hard_mode: str, ignore_index: int) -> None:
    if hard_mode not in HARD_MODES:
        raise ValueError(f"hard_mode must be one of {', '.join(HARD_MODES)}, got {hard_mode!r}")
    # a tensor's gradient would be lost
    if not isinstance(hard_floor, Real):
        raise ValueError(f"hard_floor must be a number in [0, 1], got {hard_floor!r}")
    if not 0.0 <= hard_floor <= 1.0:
        raise ValueError(f"hard_floor must be in [0, 1], got {hard_floor}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits, got {ignore_index}")


def check_target_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse a class that does not exist; reads the target on the host, so not while tracing or under torch.func."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if type(target) is not Tensor or traced or torch._C._are_functorch_transforms_active():
        return
    # in a narrower type torch would wrap an ignore_index that does not fit
    target = target.long()
    outside = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(outside.any()):
        found = target[outside]
        raise ValueError(
            f"target must be in [0, {num_classes}) or ignore_index {ignore_index}, "
            f"got {int(found[0])} ({found.numel()} cells outside)"
        )
