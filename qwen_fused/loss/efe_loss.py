"""The fused loss: public function, its weights, and what it returns.

efe_loss      -> qwen_fused::efe_loss (csrc/ops.cpp), whose node is csrc/loss/efe_autograd.cpp
  forward  CPU   csrc/loss/efe_loss_cpu.cpp: levels/forward.inc.h tile by tile, then efe_finish.h
           CUDA  kernels/efe_loss.py: efe_forward.py, then efe_finish.py, launched by launcher.py
  backward CPU   csrc/loss/efe_loss_cpu.cpp: levels/backward.inc.h
           CUDA  kernels/efe_loss.py: efe_backward.py
without the extension, CUDA -> qwen_fused::efe_loss_triton: the same kernels, and a node in Python, autograd.py
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from qwen_fused.kernels.reference import COLUMNS, TERMS, active_terms
from qwen_fused.loss import checks
from qwen_fused.loss.checks import check_float, check_options, check_plan, check_target_range, check_weight
from qwen_fused.loss.dispatch import resolve_backend, run_op, run_reference


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
    gradient has its input's dtype. A logit of -inf forbids its class, and nothing else does, however far down; what
    an ignored cell holds changes nothing, and its gradient is exactly 0. Risk and agreement are at least 0.

    First derivatives are exact in every mode, forward-mode AD and torch.func included (samples under vmap go one by
    one); a second one is refused by the fused backends, and is there with backend="reference". Under torch.compile
    weights and hard_floor may change from call to call at the price of one more compilation.

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
        class_weight: [C] float, weight of each class in the cross-entropy; all 1 when left out. Where all that count
            in an episode are 0, so is its cross-entropy. No gradient.
        weights: weight of each term, `EFEWeights()` when left out.
        hard_floor: in [0, 1], the weight of a cell (or episode) in which nothing is wrong.
        hard_mode: "episode" scales an episode's loss by floor + (1 - floor) * hard ratio, "cell" weights each
            cell's cross-entropy by 1 where wrong and floor where right, "none" does neither.
        ignore_index: target value of a cell that does not count.
        backend: "reference" (plain torch), "cpp", "triton", or "auto", which picks by device: Triton up to 16 classes,
            above which it compiles for minutes, and plain torch beyond.

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
    backend = resolve_backend(backend, plan_logits, C)
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
    options: dict[str, Any] = {"hard_floor": hard_floor, "hard_mode": hard_mode, "ignore_index": ignore_index}
    if backend == "reference":
        return EFEOutput(*run_reference(inputs, named, **options))
    loss, reported, solved, predicted, *_ = run_op(backend, inputs, [*on.values()], [*named.values()], **options)
    columns = dict(zip(COLUMNS, reported.unbind(1), strict=True))
    hard_ratio, accuracy = columns["hard"], columns.pop("accuracy")
    terms = {name: column for name, column in columns.items() if name in ("ce", "hard") or on[name]}
    return EFEOutput(loss, terms, hard_ratio, accuracy, solved, predicted)
