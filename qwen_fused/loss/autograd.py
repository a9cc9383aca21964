"""Fake tensors and autograd of the fused loss ops; the compiled and the Triton pair share one schema.

A forward op returns (loss, terms [B, 8], solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors); only loss
is differentiable, and what follows predicted is what backward needs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_fused.kernels.reference import HARD_MODES, accumulate_dtype

HARD_MODE = {name: number for number, name in enumerate(HARD_MODES)}
# columns of the terms an op returns
COLUMNS = ("ce", "risk", "ambiguity", "agreement", "anchor", "prompt", "hard", "accuracy")
WEIGHTS = 6
TENSOR_INPUTS = 9
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
    torch.library.register_autograd(backward, _refuse_second_derivative)


def _fake_forward(
    plan: Tensor, target: Tensor, back: Any, preference: Any, anchor: Any, obs_entropy: Any, prompt_colors: Any,
    step_weight: Any, class_weight: Any, weights: Any, *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, C, _, _ = plan.shape
    if len(weights) != WEIGHTS:
        raise ValueError(f"weights must hold {WEIGHTS} numbers, got {len(weights)}")
    dtype = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    ambiguity = obs_entropy is not None and weights[2] != 0
    prompt = prompt_colors is not None and weights[5] != 0

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
    prompt_colors: Any, step_weight: Any, class_weight: Any, predicted: Any, coef: Tensor, d_pooled: Tensor,
    d_obs_entropy: Tensor, d_prompt_colors: Tensor, weights: Any, hard_floor: float, hard_mode: int,
    ignore_index: int, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    _, risk, ambiguity, agreement, anchor_weight, prompt = (weight != 0 for weight in weights)
    used = (True, agreement, risk or (anchor_weight and anchor is not None), ambiguity, prompt)
    inputs = (plan, back, preference, obs_entropy, prompt_colors)
    return tuple(
        torch.empty_like(x) if x is not None and need and use else plan.new_empty(0)
        for x, need, use in zip(inputs, needs, used, strict=True)
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    loss, terms, solved, predicted, *shares = output
    hard_mode = inputs[TENSOR_INPUTS + 2]
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
    for place, need, gradient in zip(DIFFERENTIABLE, needs, found, strict=True):
        # a term that is off has no gradient, but an empty tensor
        if need and gradient.shape == saved[place].shape:
            gradients[place] = gradient
    return tuple(gradients)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "efe_loss has no second derivative in its fused backends: use backend='reference', or drop create_graph=True"
    )
