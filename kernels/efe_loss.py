"""The expected-free-energy loss in Triton: two launches forward, one backward, no host sync.

Where the extension is there this is the CUDA implementation of `qwen_fused::efe_loss` and its backward, whose node in
torch's graph is in C++. `qwen_fused::efe_loss_triton` and its backward are the same with a node in Python, for where it
is not, and for CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .efe_backward import efe_backward_kernel
from .efe_finish import efe_finish_kernel
from .efe_forward import efe_forward_kernel
from .efe_launch import capability_of, launch_row
from .efe_tile import HEAD
from .launcher import INTERPRETED, Kernel
from .reference import COLUMNS, accumulate_dtype

FORWARD, FINISH, BACKWARD = map(Kernel, (efe_forward_kernel, efe_finish_kernel, efe_backward_kernel))

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
HERE = contextlib.nullcontext()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides with that of a cell last, which for a canvas one cell wide is that of a row."""
    if x is None:
        return None
    strides = x.stride()
    return (*strides[:-1], strides[-2]) if x.shape[-1] == 1 else strides


def _is_flat(strides: Sequence[tuple[int, ...] | None], H: int, W: int) -> bool:
    """Whether the cells of every canvas lie at one stride."""
    return H == 1 or W == 1 or all(s is None or s[-2] == W * s[-1] for s in strides)


def _finish_blocks(B: int, T: int, C: int, tiles: int, ambiguity: bool, item: int) -> tuple[bool, int, int, int, int]:
    """ONE and the block sizes of the finishing kernel: its warp holds 64 numbers of 4 bytes a lane at a time."""
    classes = _power_of_2(C)
    steps, episodes = max(1, 256 // (item * classes)), 1024 // (2 * classes if ambiguity else 2)
    # two sizes, not one for each batch: every one is a kernel to compile
    return tiles <= 32, 32, min(_power_of_2(T), steps), classes, min(32, episodes) if B <= 32 else episodes


def _power_of_2(n: int) -> int:
    """The least that is not under n."""
    return 1 << (n - 1).bit_length()


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes a tensor's device the current one, where launches go."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(x.device)


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
    if plan.dim() != 5:
        raise ValueError(f"plan must be [B, T, C, H, W] on {plan.device}, got {tuple(plan.shape)}")
    B, T, C, H, W = plan.shape
    _, risk, ambiguity, agreement, anchored, prompt = on
    acc = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    empty = B * H * W == 0
    new = plan.new_zeros if empty else plan.new_empty
    loss, terms, coef = new((), dtype=acc), new((B, len(COLUMNS)), dtype=acc), new((B + 1, 2), dtype=acc)
    solved, predicted = new(B, dtype=torch.bool), new((B, H, W), dtype=torch.uint8)
    d_pooled = new((B if prompt else 0, T, C), dtype=acc)
    d_obs_entropy = new(C if ambiguity else 0, dtype=acc)
    d_prompt_colors = new((B if prompt else 0, C), dtype=acc)
    outputs = (loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors)
    if empty:
        return outputs

    launch = launch_row(C, capability_of(plan.device)).forward
    tiles = -(-H * W // launch.cells)
    slots = plan.new_empty((B, tiles, HEAD.value + T * C * (prompt + ambiguity)), dtype=acc)
    totals = plan.new_empty((B, 2 + C), dtype=acc)
    arrived = plan.new_empty(1, dtype=torch.int32)
    step_weight = None if step_weight is None else step_weight.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    strides = (_strides(plan), _strides(target), _strides(back), _strides(preference), _strides(anchor))
    terms_on = (C, risk, ambiguity, agreement, anchored, prompt)
    tl_acc = tl.float64 if acc == torch.float64 else tl.float32
    fast = acc == torch.float32 and not INTERPRETED
    with _device(plan):
        FORWARD(
            B * tiles,
            (plan, target, back, preference, anchor, step_weight, class_weight, annealed, predicted, slots, arrived),
            strides,
            (ignore_index, hard_floor, H * W, W, T, tiles),
            (
                *terms_on,
                step_weight is not None,
                class_weight is not None,
                hard_mode == HARD_CELL,
                annealed is not None,
                _is_flat(strides, H, W),
                tl_acc,
                fast,
                launch.cells,
            ),
            launch.warps,
        )
        FINISH(
            B,
            (
                slots, arrived, totals, obs_entropy, prompt_colors, annealed, loss, terms, solved, coef, d_pooled,
                d_obs_entropy, d_prompt_colors,
            ),
            (
                None if prompt_colors is None else prompt_colors.stride(),
                None if obs_entropy is None else obs_entropy.stride(),
            ),
            (hard_floor, *weights, B, T, tiles),
            (
                *terms_on,
                on[0],
                hard_mode == HARD_EPISODE,
                annealed is not None,
                tl_acc,
                *_finish_blocks(B, T, C, tiles, ambiguity, acc.itemsize),
            ),
            1,
        )  # fmt: skip
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
    _, risk, ambiguity, agreement, anchored, prompt = on
    acc = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    used = (True, agreement, risk or anchored, ambiguity, prompt)
    inputs = (plan, back, preference, obs_entropy, prompt_colors)
    wanted = tuple([need and use for need, use in zip(needs, used, strict=True)])
    empty = B * H * W == 0
    like = torch.zeros_like if empty else torch.empty_like
    grads = tuple(
        [like(x) if want and x is not None else plan.new_empty(0) for x, want in zip(inputs, wanted, strict=True)]
    )
    if empty or not any(wanted):
        return grads

    d_plan, d_back, d_preference, d_obs_entropy, d_prompt_colors = grads
    # the small ones are written in order, where empty_like may have kept a transposed one's strides
    small = [x if x.is_contiguous() else x.new_empty(x.shape) for x in (d_obs_entropy, d_prompt_colors)]
    obs_entropy = None if obs_entropy is None else obs_entropy.contiguous()
    step_weight = None if step_weight is None else step_weight.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    launch = launch_row(C, capability_of(plan.device)).backward
    tiles = -(-H * W // launch.cells)
    strides = [_strides(x) for x in (plan, target, back, preference, anchor)]
    strides += [_strides(x) if want else None for x, want in zip(grads[:3], wanted, strict=False)]
    with _device(plan):
        BACKWARD(
            B * tiles,
            (
                plan, target, back, preference, anchor, obs_entropy, step_weight, class_weight, annealed, predicted,
                grad, coef, d_pooled, obs_entropy_share, prompt_colors_share, d_plan, d_back, d_preference, *small,
            ),
            strides,
            # the cross-entropy has no flag of its own
            (ignore_index, hard_floor, weights[0] if on[0] else 0.0, *weights[1:5], B, H * W, W, T, tiles),
            (
                C,
                risk,
                ambiguity,
                agreement,
                anchored,
                prompt,
                step_weight is not None,
                class_weight is not None,
                hard_mode == HARD_CELL,
                annealed is not None,
                *wanted,
                _is_flat(strides, H, W),
                tl.float64 if acc == torch.float64 else tl.float32,
                acc == torch.float32 and not INTERPRETED,
                launch.cells,
            ),
            launch.warps,
        )  # fmt: skip
    for gradient, written in zip((d_obs_entropy, d_prompt_colors), small, strict=True):
        if gradient is not written:
            gradient.copy_(written)
    return grads


def implement(device: str) -> torch.library.Library:
    """Make this the implementation of `qwen_fused::efe_loss` and its backward for as long as what comes back is kept.

    Args:
        device: dispatch key, as "CUDA".
    """
    library = torch.library.Library("qwen_fused", "IMPL")
    library.impl("efe_loss", _forward, device, allow_override=True)
    library.impl("efe_loss_backward", _backward, device, allow_override=True)
    return library


torch.library.custom_op("qwen_fused::efe_loss_triton", _forward, mutates_args=(), schema=FORWARD_SCHEMA)
torch.library.custom_op("qwen_fused::efe_loss_triton_backward", _backward, mutates_args=(), schema=BACKWARD_SCHEMA)
