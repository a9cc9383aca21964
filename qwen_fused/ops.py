"""The fused losses: public functions, their arguments' checks, and the choice of backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_fused.kernels.reference import HARD_MODES, efe_loss_reference

BACKENDS = ("auto", "triton", "cpp", "reference")
MAX_CLASSES = 64
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class EFEWeights:
    """Weight of each term of the loss; a weight of exactly 0 drops the term's computation."""

    ce: float = 1.0
    """Cross-entropy of the plan against the target."""
    risk: float = 1.0
    """KL of the plan from the preference."""
    ambiguity: float = 0.0
    """Expected observation entropy under the plan."""
    agreement: float = 0.5
    """Jensen-Shannon divergence of the forward and the backward plan."""
    anchor: float = 0.2
    """KL of the preference from the anchored preference."""
    prompt: float = 0.3
    """Negative cosine of the pooled plan and the prompt's colours."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise ValueError(f"weights.{field.name} must be finite, got {value}")


class EFEOutput(NamedTuple):
    """What one pass over the plan gives; only `loss` carries a gradient."""

    loss: Tensor
    """0-d, float64 for float64 input and float32 otherwise."""
    terms: dict[str, Tensor]
    """Name of each term computed -> [B], unweighted; "ce" and "hard" are always there."""
    hard_ratio: Tensor
    """[B] share of the valid cells that the last step gets wrong."""
    accuracy: Tensor
    """[B] share of the valid cells that the last step gets right."""
    solved: Tensor
    """[B] bool: there are valid cells and all of them are right."""
    predicted: Tensor
    """[B, H, W] uint8 argmax of the last step, 255 where the target is ignored."""


def efe_loss(
    plan_logits: Tensor,
    target: Tensor,
    *,
    back_logits: Tensor | None = None,
    preference_logits: Tensor | None = None,
    anchor_log_probs: Tensor | None = None,
    obs_entropy: Tensor | None = None,
    prompt_colors: Tensor | None = None,
    step_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    weights: EFEWeights | None = None,
    hard_floor: float = 0.5,
    hard_mode: str = "episode",
    ignore_index: int = -100,
    backend: str = "auto",
) -> EFEOutput:
    """Score a plan by its hard-cell cross-entropy and expected free energy; an input left out drops its term.

    The formulas are those of `qwen_fused.kernels.reference`, which follow the active-inference split of
    expected free energy into risk and ambiguity. fp16, bf16 and fp32 accumulate in fp32, fp64 in fp64; each
    gradient has its input's dtype. -inf logits are legal; what an ignored cell holds changes nothing, and its
    gradient is exactly 0.

    Args:
        plan_logits: [B, T, C, H, W] float, any strides: the forward plan, whose last step is the answer.
            At most 64 classes.
        target: [B, H, W] integer classes, `ignore_index` where there is no cell.
        back_logits: [B, T, C, H, W] float, the backward plan, aligned step by step with `plan_logits`.
        preference_logits: [B, C, H, W] float, the learned preference.
        anchor_log_probs: [C, H, W] float, log of the anchored preference; no gradient.
        obs_entropy: [C] float, entropy in nats of the observation given each state.
        prompt_colors: [B, C] float, the prompt projected to the classes.
        step_weight: [T] float, weight of each step's cross-entropy; only the last step when left out.
            No gradient.
        class_weight: [C] float, weight of each class in the cross-entropy; all 1 when left out. No gradient.
        weights: weight of each term, `EFEWeights()` when left out.
        hard_floor: in [0, 1], the weight of a cell (or episode) in which nothing is wrong.
        hard_mode: "episode" scales an episode's loss by floor + (1 - floor) * hard ratio, "cell" weights each
            cell's cross-entropy by 1 where wrong and floor where right, "none" does neither.
        ignore_index: target value of a cell that does not count.
        backend: "reference" (plain torch), "cpp", "triton", or "auto", which picks by device.

    Returns:
        The loss, averaged over the episodes that have a valid cell, and what the same pass reports.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value. On the CPU this includes a target
            outside [0, C) that is not ignored. On CUDA such a target makes the loss NaN, as finding it costs
            a host sync; `qwen_fused.ops.CHECK_TARGETS = True` looks for it there too.
    """
    weights = EFEWeights() if weights is None else weights
    _check_plan(plan_logits, target)
    B, T, C, H, W = plan_logits.shape
    _check_float("back_logits", back_logits, (B, T, C, H, W), "[B, T, C, H, W] like plan_logits", plan_logits)
    _check_float("preference_logits", preference_logits, (B, C, H, W), "[B, C, H, W]", plan_logits)
    _check_float("anchor_log_probs", anchor_log_probs, (C, H, W), "[C, H, W]", plan_logits, grad=False)
    _check_float("obs_entropy", obs_entropy, (C,), "[C]", plan_logits)
    _check_float("prompt_colors", prompt_colors, (B, C), "[B, C]", plan_logits)
    _check_float("step_weight", step_weight, (T,), "[T]", plan_logits, grad=False)
    _check_float("class_weight", class_weight, (C,), "[C]", plan_logits, grad=False)
    _check_options(weights, hard_floor, hard_mode, ignore_index)
    backend = _resolve_backend(backend, plan_logits)
    if CHECK_TARGETS or (backend == "reference" and target.device.type == "cpu"):
        _check_target_range(target, C, ignore_index)

    result = efe_loss_reference(
        plan_logits,
        target,
        weights={name: getattr(weights, name) for name in TERMS},
        back=back_logits,
        preference=preference_logits,
        anchor=anchor_log_probs,
        obs_entropy=obs_entropy,
        prompt_colors=prompt_colors,
        step_weight=step_weight,
        class_weight=class_weight,
        hard_floor=hard_floor,
        hard_mode=hard_mode,
        ignore_index=ignore_index,
    )
    return EFEOutput(*result)


def hard_cell_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    hard_floor: float = 0.5,
    hard_mode: str = "episode",
    ignore_index: int = -100,
    backend: str = "auto",
) -> EFEOutput:
    """Weight a cross-entropy by how wrong its episode or cell is: `efe_loss` with that term alone.

    [N, C] is one episode of N cells: with hard_mode="none" the loss is F.cross_entropy(logits, target,
    weight=class_weight, ignore_index=ignore_index), or 0 when every cell is ignored. [B, C, H, W] is B
    episodes: the mean over an episode's cells comes before the mean over the episodes.

    Args:
        logits: [N, C] or [B, C, H, W] float, any strides. C <= 64.
        target: [N] or [B, H, W] integer classes, `ignore_index` where there is no cell.
        class_weight, hard_floor, hard_mode, ignore_index, backend: as in `efe_loss`.

    Returns:
        As `efe_loss`, with `predicted` in the shape of `target`; per-episode results are [1] for [N, C].

    Raises:
        ValueError: as `efe_loss`.
    """
    if logits.dim() not in (2, 4):
        raise ValueError(f"logits must be [N, C] or [B, C, H, W], got {tuple(logits.shape)}")
    flat = logits.dim() == 2
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        expected = "[N]" if flat else "[B, H, W]"
        raise ValueError(
            f"target must be {expected} for logits of shape {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    plan = logits.t()[None, None, :, :, None] if flat else logits[:, None]
    out = efe_loss(
        plan,
        target[None, :, None] if flat else target,
        class_weight=class_weight,
        weights=CE_ONLY,
        hard_floor=hard_floor,
        hard_mode=hard_mode,
        ignore_index=ignore_index,
        backend=backend,
    )
    return out._replace(predicted=out.predicted[0, :, 0]) if flat else out


def _check_plan(plan: Tensor, target: Tensor) -> None:
    if plan.dim() != 5:
        raise ValueError(f"plan_logits must be [B, T, C, H, W], got {tuple(plan.shape)}")
    if plan.dtype not in FLOAT_DTYPES:
        raise ValueError(f"plan_logits must be float16, bfloat16, float32 or float64, got {plan.dtype}")
    B, T, C, H, W = plan.shape
    if T < 1:
        raise ValueError(f"plan_logits must have at least one step T, got {tuple(plan.shape)}")
    if not 1 <= C <= MAX_CLASSES:
        raise ValueError(
            f"plan_logits must have 1 to {MAX_CLASSES} classes, got C = {C} in {tuple(plan.shape)}"
        )
    if target.shape != (B, H, W):
        raise ValueError(f"target must be [B, H, W] = {(B, H, W)}, got {tuple(target.shape)}")
    if target.dtype not in INTEGER_DTYPES:
        raise ValueError(f"target must have an integer dtype, got {target.dtype}")
    if target.device != plan.device:
        raise ValueError(f"target must be on {plan.device} like plan_logits, got {target.device}")


def _check_float(
    name: str, x: Tensor | None, shape: tuple[int, ...], axes: str, plan: Tensor, *, grad: bool = True
) -> None:
    """Check an optional float argument; `grad=False` refuses one whose gradient would be lost."""
    if x is None:
        return
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device != plan.device:
        raise ValueError(f"{name} must be on {plan.device} like plan_logits, got {x.device}")
    if not grad and x.requires_grad:
        raise ValueError(f"{name} must not require grad, as no gradient flows to it, got requires_grad=True")


def _check_options(weights: EFEWeights, hard_floor: float, hard_mode: str, ignore_index: int) -> None:
    if not isinstance(weights, EFEWeights):
        raise ValueError(f"weights must be an EFEWeights, got {type(weights).__name__}")
    if hard_mode not in HARD_MODES:
        raise ValueError(f"hard_mode must be one of {HARD_MODES}, got {hard_mode!r}")
    if not 0.0 <= hard_floor <= 1.0:
        raise ValueError(f"hard_floor must be in [0, 1], got {hard_floor}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")


def _check_target_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse a class that does not exist; reads the target on the host, so not while tracing."""
    if type(target) is not Tensor or torch.compiler.is_compiling():
        return
    outside = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(outside.any()):
        found = target[outside]
        raise ValueError(
            f"target must be in [0, {num_classes}) or ignore_index {ignore_index}, "
            f"got {int(found[0])} ({found.numel()} cells outside)"
        )


def _resolve_backend(backend: str, plan: Tensor) -> str:
    """Name of the implementation to run; "auto" picks the fastest that serves the device of `plan`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        return "reference"
    if backend != "reference":
        raise ValueError(f"backend must be available, got {backend!r}, which is not built here")
    return backend


CHECK_TARGETS = False
"""Debug switch: look for targets out of range on every device, at the price of a host sync."""

TERMS = tuple(field.name for field in fields(EFEWeights))
CE_ONLY = EFEWeights(risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)
