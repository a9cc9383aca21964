"""The fused losses: public functions, their arguments' checks, and the choice of backend.

efe_loss      -> qwen_fused::efe_loss (csrc/ops.cpp), or qwen_fused::efe_loss_triton: one schema, autograd.py
  forward  CPU   csrc/loss/efe_loss_cpu.cpp: levels/forward.inc.h tile by tile, then efe_finish.h
           CUDA  kernels/efe_loss.py: efe_forward.py, then efe_finish.py
  backward CPU   csrc/loss/efe_autograd.cpp, efe_loss_cpu.cpp: levels/backward.inc.h
           CUDA  kernels/efe_loss.py: efe_backward.py
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_fused import backends
from qwen_fused.kernels.reference import COLUMNS, TERMS, active_terms, efe_loss_reference
from qwen_fused.loss import checks
from qwen_fused.loss.autograd import HARD_MODE, register_autograd, register_fakes
from qwen_fused.loss.checks import check_float, check_options, check_plan, check_target_range, check_weight

# asked once: torch.compile can't ask
COMPILED = backends.has_kernel("efe_loss", "cpu")
if COMPILED:
    register_fakes("efe_loss")
if backends.HAS_TRITON:
    # registers the op and its backward
    from qwen_fused.kernels import efe_loss as triton_loss

    register_fakes("efe_loss_triton")
    register_autograd("efe_loss_triton")

BACKENDS = ("auto", "triton", "cpp", "reference")


@dataclass(frozen=True, kw_only=True)
class EFEWeights:
    """Weight of each term of the loss, at least 0 and without unit; exactly 0 drops the term's computation.

    The terms are in nats per cell, but for `prompt`, a cosine; their formulas are at the head of
    `qwen_fused.kernels.reference`.

    Raises:
        ValueError: a weight is negative, not finite, or no number.
    """

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
            check_weight(field.name, getattr(self, field.name))


CE_ONLY = EFEWeights(risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)


class EFEOutput(NamedTuple):
    """What one pass over the plan gives; only `loss` carries a gradient.

    Formulas are at the head of `qwen_fused.kernels.reference`.
    """

    loss: Tensor
    """0-d, in nats; float64 for float64 input and float32 otherwise, as everything but `solved` and `predicted` is."""
    terms: dict[str, Tensor]
    """Name of each term computed -> [B], unweighted, in nats per cell; "ce" and "hard", a share, are always there."""
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
            a host sync; `qwen_fused.loss.checks.set_check_targets(True)`, or QWEN_FUSED_CHECK_TARGETS=1 in the
            environment, looks for it there too.
    """
    weights = EFEWeights() if weights is None else weights
    check_plan(plan_logits, target)
    B, T, C, H, W = plan_logits.shape
    check_float("back_logits", back_logits, (B, T, C, H, W), "[B, T, C, H, W] like plan_logits", plan_logits)
    check_float("preference_logits", preference_logits, (B, C, H, W), "[B, C, H, W]", plan_logits)
    check_float("anchor_log_probs", anchor_log_probs, (C, H, W), "[C, H, W]", plan_logits, grad=False)
    check_float("obs_entropy", obs_entropy, (C,), "[C]", plan_logits)
    check_float("prompt_colors", prompt_colors, (B, C), "[B, C]", plan_logits)
    check_float("step_weight", step_weight, (T,), "[T]", plan_logits, grad=False)
    check_float("class_weight", class_weight, (C,), "[C]", plan_logits, grad=False)
    check_options(hard_floor, hard_mode, ignore_index)
    if not isinstance(weights, EFEWeights):
        raise ValueError(f"weights must be an EFEWeights, got {type(weights).__name__}")
    backend = _resolve_backend(backend, plan_logits)
    if checks.check_targets or (backend == "reference" and target.device.type == "cpu"):
        check_target_range(target, C, ignore_index)

    named = {name: getattr(weights, name) for name in TERMS}
    on = active_terms(
        named,
        back=back_logits,
        preference=preference_logits,
        anchor=anchor_log_probs,
        obs_entropy=obs_entropy,
        prompt_colors=prompt_colors,
    )
    # what no term reads is not handed on: its dtype, and whether it wants a gradient, are then no matter
    inputs: dict[str, Any] = {
        "plan": plan_logits,
        "target": target,
        "back": back_logits if on["agreement"] else None,
        "preference": preference_logits if on["risk"] or on["anchor"] else None,
        "anchor": anchor_log_probs if on["anchor"] else None,
        "obs_entropy": obs_entropy if on["ambiguity"] else None,
        "prompt_colors": prompt_colors if on["prompt"] else None,
        "step_weight": step_weight,
        "class_weight": class_weight,
    }
    options: dict[str, Any] = {"hard_floor": hard_floor, "ignore_index": ignore_index}
    if backend == "reference":
        return EFEOutput(*efe_loss_reference(**inputs, weights=named, hard_mode=hard_mode, **options))
    op = torch.ops.qwen_fused.efe_loss if backend == "cpp" else torch.ops.qwen_fused.efe_loss_triton
    loss, reported, solved, predicted, *_ = op(
        **inputs, on=[*on.values()], weights=[*named.values()], hard_mode=HARD_MODE[hard_mode], **options
    )
    columns = dict(zip(COLUMNS, reported.unbind(1), strict=True))
    hard_ratio, accuracy = columns["hard"], columns.pop("accuracy")
    terms = {name: column for name, column in columns.items() if name in ("ce", "hard") or on[name]}
    return EFEOutput(loss, terms, hard_ratio, accuracy, solved, predicted)


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


def _resolve_backend(backend: str, plan: Tensor) -> str:
    """Name of the implementation to run; "auto" picks the fastest that serves the device of `plan`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = plan.device.type
    if backend == "auto":
        fast = {"cpu": "cpp" if COMPILED else None, "cuda": "triton" if backends.HAS_TRITON else None}
        return fast.get(device) or "reference"
    if backend == "cpp" and not (COMPILED and device == "cpu"):
        reason = f"plan_logits on {plan.device}" if COMPILED else f"none: {backends.EXTENSION_ERROR}"
        raise ValueError(f"backend='cpp' must have the compiled extension and CPU tensors, got {reason}")
    if backend == "triton":
        if not backends.HAS_TRITON:
            raise ValueError(f"backend='triton' must have Triton, got none: {backends.TRITON_ERROR}")
        if device != "cuda" and not (device == "cpu" and triton_loss.INTERPRETED):
            raise ValueError(
                "backend='triton' must have CUDA tensors, or CPU tensors and TRITON_INTERPRET=1 in the environment, "
                f"got plan_logits on {plan.device}"
            )
    return backend
