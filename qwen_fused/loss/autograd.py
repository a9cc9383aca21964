"""Fake tensors and autograd of the fused loss ops; the compiled and the Triton pair share one schema.

A forward op returns (loss, terms [B, 8], solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors); only loss
is differentiable, and what follows predicted is what backward needs. `on` says which terms count: it was decided before
(`active_terms` in kernels/reference.py), and nothing here looks at weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from qwen_fused.kernels.reference import COLUMNS, HARD_MODES, TERMS, accumulate_dtype

HARD_MODE = {name: number for number, name in enumerate(HARD_MODES)}
# tensors of the schema that callers give, in its order; behind them comes `annealed`
ARGUMENTS = (
    "plan", "target", "back", "preference", "anchor", "obs_entropy", "prompt_colors", "step_weight", "class_weight",
)  # fmt: skip
TENSOR_INPUTS = len(ARGUMENTS) + 1
# places of plan, back, preference, obs_entropy and prompt_colors in the schema
DIFFERENTIABLE = (0, 2, 3, 5, 6)


def register_fakes(name: str) -> None:
    """Give `qwen_fused::<name>` and `qwen_fused::<name>_backward` their fake tensors."""
    torch.library.register_fake(f"qwen_fused::{name}", _fake_forward)
    torch.library.register_fake(f"qwen_fused::{name}_backward", _fake_backward)


def register_autograd(name: str) -> None:
    """Give them their autograd, which csrc/loss/efe_autograd.cpp has for the compiled pair."""
    forward, backward = f"qwen_fused::{name}", f"qwen_fused::{name}_backward"
    gradients = partial(_backward, getattr(torch.ops.qwen_fused, f"{name}_backward"))
    torch.library.register_autograd(forward, gradients, setup_context=_save)
    torch.library.register_autograd(backward, refuse_second_derivative)


def _fake_forward(
    plan: Tensor, target: Tensor, back: Any, preference: Any, anchor: Any, obs_entropy: Any, prompt_colors: Any,
    step_weight: Any, class_weight: Any, annealed: Any, on: Sequence[bool], weights: Any, *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    # [N, C] and [B, C, H, W] are one step
    B = 1 if plan.dim() == 2 else plan.shape[0]
    T, C = (plan.shape[1], plan.shape[2]) if plan.dim() == 5 else (1, plan.shape[1])
    if len(weights) != len(TERMS):
        raise ValueError(f"weights must hold {len(TERMS)} numbers, got {len(weights)}")
    dtype = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    _, _, ambiguity, _, _, prompt = on

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return plan.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(B, len(COLUMNS)),
        new(B, dtype=torch.bool),
        new(*target.shape, dtype=torch.uint8),
        new(B + 1, 2),
        new(B if prompt else 0, T, C),
        new(C if ambiguity else 0),
        new(B if prompt else 0, C),
    )


def _fake_backward(
    grad: Tensor, plan: Tensor, target: Tensor, back: Any, preference: Any, anchor: Any, obs_entropy: Any,
    prompt_colors: Any, step_weight: Any, class_weight: Any, annealed: Any, predicted: Any, coef: Tensor,
    d_pooled: Tensor, d_obs_entropy: Tensor, d_prompt_colors: Tensor, on: Sequence[bool], weights: Any,
    hard_floor: float, hard_mode: int, ignore_index: int, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (plan, back, preference, obs_entropy, prompt_colors)
    return tuple(
        torch.empty_like(x) if need and read else plan.new_empty(0)
        for x, need, read in zip(inputs, needs, read_by(on), strict=True)
    )


def read_by(on: Sequence[bool]) -> tuple[bool, bool, bool, bool, bool]:
    """Whether plan, back, preference, obs_entropy and prompt_colors are read by a term that is on."""
    _, risk, ambiguity, agreement, anchor, prompt = on
    return True, agreement, risk or anchor, ambiguity, prompt


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    loss, terms, solved, predicted, *shares = output
    _, _, _, hard_mode, _ = inputs[TENSOR_INPUTS:]
    if hard_mode != HARD_MODE["cell"]:
        # not needed, and not saved: whoever called may then write into it
        predicted = None
    ctx.save_for_backward(*inputs[:TENSOR_INPUTS], predicted, *shares)
    ctx.options = inputs[TENSOR_INPUTS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * (TENSOR_INPUTS + len(ctx.options))
    if grad is None:
        return tuple(gradients)
    needs = [ctx.needs_input_grad[place] for place in DIFFERENTIABLE]
    saved = ctx.saved_tensors
    found = op(grad, *saved, *ctx.options, needs)
    on = ctx.options[0]
    for place, need, read, gradient in zip(DIFFERENTIABLE, needs, read_by(on), found, strict=True):
        # what no term reads has no gradient, but an empty tensor
        if need and read:
            gradients[place] = gradient
    return tuple(gradients)


def refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    """Stand for the derivative of a gradient."""
    raise RuntimeError(
        "efe_loss has no second derivative in its fused backends: use backend='reference', or drop create_graph=True"
    )
