"""The expected-free-energy loss in Triton, as two custom ops: two launches forward, one backward, no host sync.

`qwen_fused::efe_loss_triton` and its backward have the schema of the C++ ops; `qwen_fused.loss.efe_loss` gives both
pairs their autograd. They run on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before Triton was
imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .efe_backward import efe_backward_kernel
from .efe_finish import efe_finish_kernel
from .efe_forward import efe_forward_kernel
from .efe_launch import capability_of, launch_row
from .efe_tile import HEAD
from .reference import COLUMNS, TERMS, accumulate_dtype

INTERPRETED = triton.knobs.runtime.interpret

FORWARD_SCHEMA = (
    "(Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, Tensor? obs_entropy, "
    "Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, Tensor? annealed, bool[6] on, "
    "float[] weights, float hard_floor, int hard_mode, int ignore_index) -> (Tensor loss, Tensor terms, "
    "Tensor solved, Tensor predicted, Tensor coef, Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, "
    "Tensor? obs_entropy, Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, Tensor? annealed, "
    "Tensor? predicted, Tensor coef, Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors, bool[6] on, "
    "float[] weights, float hard_floor, int hard_mode, int ignore_index, bool[5] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

HARD_EPISODE, HARD_CELL = 0, 1


def _is_flat(x: Tensor | None) -> bool:
    """Whether the cells of the last two axes lie at one stride."""
    return x is None or 1 in x.shape[-2:] or x.stride(-2) == x.shape[-1] * x.stride(-1)


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides with that of a cell last, which for a canvas one cell wide is that of a row."""
    if x is None:
        return None
    strides = x.stride()
    return (*strides[:-1], strides[-2]) if x.shape[-1] == 1 else strides


def _flags(on: Sequence[bool]) -> dict[str, bool]:
    """The kernels' names for the terms that they compute only where on; the cross-entropy always is."""
    return {name.upper(): flag for name, flag in zip(TERMS, on, strict=True) if name != "ce"}


def _finish_blocks(B: int, T: int, C: int, tiles: int, ambiguity: bool, item: int) -> dict[str, int]:
    """Block sizes of the finishing kernel: one warp holds 64 numbers of 4 bytes a lane at a time."""
    classes = triton.next_power_of_2(C)
    width = 2 * classes if ambiguity else 2
    return {
        "ONE": tiles <= 32,
        "BLOCK": 32,
        "BLOCK_T": min(triton.next_power_of_2(T), max(1, 256 // (item * classes))),
        "BLOCK_C": classes,
        "BLOCK_B": min(triton.next_power_of_2(B), 1024 // width),
        "num_warps": 1,
    }


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _forward(
    plan: Tensor,  # [B, T, C, H, W]
    target: Tensor,  # [B, H, W]
    back: Tensor | None,
    preference: Tensor | None,
    anchor: Tensor | None,
    obs_entropy: Tensor | None,
    prompt_colors: Tensor | None,
    step_weight: Tensor | None,
    class_weight: Tensor | None,
    annealed: Tensor | None,
    on: Sequence[bool],
    weights: Sequence[float],
    hard_floor: float,
    hard_mode: int,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    B, T, C, H, W = plan.shape
    acc = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    flags = _flags(on)
    empty = B * H * W == 0
    new = plan.new_zeros if empty else plan.new_empty
    loss, terms, coef = new((), dtype=acc), new((B, len(COLUMNS)), dtype=acc), new((B + 1, 2), dtype=acc)
    solved, predicted = new(B, dtype=torch.bool), new((B, H, W), dtype=torch.uint8)
    d_pooled = new((B if flags["PROMPT"] else 0, T, C), dtype=acc)
    d_obs_entropy = new(C if flags["AMBIGUITY"] else 0, dtype=acc)
    d_prompt_colors = new((B if flags["PROMPT"] else 0, C), dtype=acc)
    outputs = (loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors)
    if empty:
        return outputs

    launch = launch_row(C, capability_of(plan.device)).forward
    tiles = triton.cdiv(H * W, launch.cells)
    tail = T * C * (flags["PROMPT"] + flags["AMBIGUITY"])
    slots = plan.new_empty((B, tiles, HEAD.value + tail), dtype=acc)
    totals = plan.new_empty((B, 2 + C), dtype=acc)
    arrived = plan.new_empty(1, dtype=torch.int32)
    tl_acc = tl.float64 if acc == torch.float64 else tl.float32
    with _device(plan):
        efe_forward_kernel[(B * tiles,)](
            plan,
            target,
            back,
            preference,
            anchor,
            None if step_weight is None else step_weight.contiguous(),
            None if class_weight is None else class_weight.contiguous(),
            annealed,
            predicted,
            slots,
            arrived,
            _strides(plan),
            _strides(target),
            _strides(back),
            _strides(preference),
            _strides(anchor),
            ignore_index,
            hard_floor,
            H * W,
            W,
            T,
            tiles,
            C=C,
            **flags,
            STEP_WEIGHT=step_weight is not None,
            CLASS_WEIGHT=class_weight is not None,
            HARD_CELL=hard_mode == HARD_CELL,
            ANNEALED=annealed is not None,
            FLAT=all(map(_is_flat, (plan, target, back, preference, anchor))),
            ACC=tl_acc,
            FAST=acc == torch.float32 and not INTERPRETED,
            BLOCK_P=launch.cells,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
        efe_finish_kernel[(B,)](
            slots,
            arrived,
            totals,
            obs_entropy,
            prompt_colors,
            annealed,
            None if prompt_colors is None else prompt_colors.stride(),
            None if obs_entropy is None else obs_entropy.stride(0),
            loss,
            terms,
            solved,
            coef,
            d_pooled,
            d_obs_entropy,
            d_prompt_colors,
            hard_floor,
            *weights,
            B,
            T,
            tiles,
            C=C,
            **flags,
            USE_CE=on[0],
            HARD_EPISODE=hard_mode == HARD_EPISODE,
            ANNEALED=annealed is not None,
            ACC=tl_acc,
            **_finish_blocks(B, T, C, tiles, flags["AMBIGUITY"], acc.itemsize),
            enable_fp_fusion=True,
        )
    return outputs


def _backward(
    grad: Tensor,  # []
    plan: Tensor,
    target: Tensor,
    back: Tensor | None,
    preference: Tensor | None,
    anchor: Tensor | None,
    obs_entropy: Tensor | None,
    prompt_colors: Tensor | None,
    step_weight: Tensor | None,
    class_weight: Tensor | None,
    annealed: Tensor | None,
    predicted: Tensor | None,
    coef: Tensor,
    d_pooled: Tensor,
    obs_entropy_share: Tensor,
    prompt_colors_share: Tensor,
    on: Sequence[bool],
    weights: Sequence[float],
    hard_floor: float,
    hard_mode: int,
    ignore_index: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    B, T, C, H, W = plan.shape
    acc = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    flags = _flags(on)
    preference_used = flags["RISK"] or flags["ANCHOR"]
    used = (True, flags["AGREEMENT"], preference_used, flags["AMBIGUITY"], flags["PROMPT"])
    inputs = (plan, back, preference, obs_entropy, prompt_colors)
    wanted = tuple(need and use for need, use in zip(needs, used, strict=True))
    empty = B * H * W == 0
    d_plan, d_back, d_preference, d_obs_entropy, d_prompt_colors = grads = tuple(
        (torch.zeros_like(x) if empty else torch.empty_like(x)) if want and x is not None else plan.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )
    if empty or not any(wanted):
        return grads

    # the small ones are written in order, where empty_like may have kept a transposed one's strides
    small = [x if x.is_contiguous() else x.new_empty(x.shape) for x in (d_obs_entropy, d_prompt_colors)]
    launch = launch_row(C, capability_of(plan.device)).backward
    tiles = triton.cdiv(H * W, launch.cells)
    canvases = (plan, target, back, preference, anchor, d_plan, d_back, d_preference)
    with _device(plan):
        efe_backward_kernel[(B * tiles,)](
            plan,
            target,
            back,
            preference,
            anchor,
            None if obs_entropy is None else obs_entropy.contiguous(),
            None if step_weight is None else step_weight.contiguous(),
            None if class_weight is None else class_weight.contiguous(),
            annealed,
            predicted,
            grad,
            coef,
            d_pooled,
            obs_entropy_share,
            prompt_colors_share,
            d_plan,
            d_back,
            d_preference,
            *small,
            *(_strides(x) if x is None or x.dim() > 1 else None for x in canvases),
            ignore_index,
            hard_floor,
            # the cross-entropy has no flag of its own
            weights[0] if on[0] else 0.0,
            *weights[1:5],
            B,
            H * W,
            W,
            T,
            tiles,
            C=C,
            **flags,
            STEP_WEIGHT=step_weight is not None,
            CLASS_WEIGHT=class_weight is not None,
            HARD_CELL=hard_mode == HARD_CELL,
            ANNEALED=annealed is not None,
            D_PLAN=wanted[0],
            D_BACK=wanted[1],
            D_PREFERENCE=wanted[2],
            D_OBS_ENTROPY=wanted[3],
            D_PROMPT_COLORS=wanted[4],
            FLAT=all(_is_flat(x) for x in canvases if x is None or x.dim() > 1),
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            FAST=acc == torch.float32 and not INTERPRETED,
            BLOCK_P=launch.cells,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
    for gradient, written in zip((d_obs_entropy, d_prompt_colors), small, strict=True):
        if gradient is not written:
            gradient.copy_(written)
    return grads


torch.library.custom_op("qwen_fused::efe_loss_triton", _forward, mutates_args=(), schema=FORWARD_SCHEMA)
torch.library.custom_op("qwen_fused::efe_loss_triton_backward", _backward, mutates_args=(), schema=BACKWARD_SCHEMA)
