"""The fused losses under forward-mode AD and torch.func, where a plain op would pass tangents by without a word.

Only the loss has a derivative, and the loss is one number: its tangent is the inner product of its gradient, which is
one backward pass, with the tangents of the inputs. Under vmap samples go one by one. A second derivative is in none of
the fused backends; whichever way it is asked for, the answer is the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qwen_fused.loss.autograd import DIFFERENTIABLE, TENSOR_INPUTS, read_by, refuse_second_derivative


class Ops(NamedTuple):
    """A pair of fused ops, and their arguments that are no tensors, in the order of the schema."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    options: tuple[Any, ...]


def active() -> bool:
    """Whether a level of forward-mode AD or a transform of torch.func is open here."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def call(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the op `name` returns, with derivatives of the first order in every mode."""
    forward, backward = (getattr(torch.ops.qwen_fused, f"{name}{direction}") for direction in ("", "_backward"))
    return Loss.apply(Ops(forward, backward, options), *tensors)


class Loss(torch.autograd.Function):
    """The forward op."""

    @staticmethod
    def forward(ops: Ops, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return ops.forward(*tensors, *ops.options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ops, *tensors = inputs
        _, _, _, *shares = output
        ctx.ops = ops
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *shares)
        ctx.save_for_forward(*tensors, *shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * (1 + TENSOR_INPUTS)
        if grad is None:
            return tuple(gradients)
        needs = tuple(ctx.needs_input_grad[1 + place] for place in DIFFERENTIABLE)
        found = Gradient.apply(ctx.ops, needs, grad, *ctx.saved_tensors)
        for place, need, read, gradient in zip(DIFFERENTIABLE, needs, read_by(ctx.ops.options[0]), found, strict=True):
            if need and read:
                gradients[1 + place] = gradient
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        moved = [tangents[place] for place in DIFFERENTIABLE]
        needs = tuple(tangent is not None for tangent in moved)
        saved: list[Any] = [x if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
        one = torch.ones_like(saved[TENSOR_INPUTS + 1][0, 0])
        found = Gradient.apply(ctx.ops, needs, one, *saved)
        tangent = torch.zeros_like(one)
        for read, gradient, direction in zip(read_by(ctx.ops.options[0]), found, moved, strict=True):
            if read and direction is not None:
                tangent = tangent + (gradient.to(one.dtype) * direction.to(one.dtype)).sum()
        return (tangent, *[None] * 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(Loss, info.batch_size, in_dims, inputs)


class Gradient(torch.autograd.Function):
    """The backward op."""

    @staticmethod
    def forward(ops: Ops, needs: tuple[bool, ...], grad: Tensor, *saved: Tensor | None) -> tuple[Tensor, ...]:
        return ops.backward(grad, *saved, *ops.options, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        refuse_second_derivative(ctx)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_second_derivative(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        ops, needs, grad, *saved = inputs
        if any(dim is not None for dim in in_dims[3:]):
            return _one_by_one(Gradient, info.batch_size, in_dims, inputs)
        # several upstream factors of one loss: its gradient is linear in them
        found = Gradient.apply(ops, needs, torch.ones_like(grad[0]), *saved)
        scaled = [torch.stack([factor.to(x.dtype) * x for factor in grad]) for x in found]
        return tuple(scaled), (0,) * len(scaled)


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple, inputs: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Outputs of a call for each sample, stacked in front."""
    # of what is no tensor, in_dims may be a tree
    rows = [
        function.apply(
            *(x.select(dim, k) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims, strict=True))
        )
        for k in range(size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return stacked, (0,) * len(stacked)
