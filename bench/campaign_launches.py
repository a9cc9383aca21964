"""The campaign's check of launches past Triton's launcher: what comes out is what comes out by it, to the bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator

import torch
from devices import synchronize
from efe_cases import ALL_TERMS, DIFFERENTIABLE, make_case
from torch import Tensor

from qwen_fused.loss.efe_loss import efe_loss

CALLS = 30


def laid(draw: random.Random, x: Tensor) -> Tensor:
    """The same values in memory of another order, with gaps, and beginning anywhere."""
    order = draw.sample(range(x.dim()), x.dim())
    sizes = [x.shape[dim] + draw.choice((0, 0, 1)) for dim in order]
    begin = draw.choice((0, 1, 3))
    memory = x.new_empty(begin + math.prod(sizes))[begin:].view(sizes)
    place = memory.permute([order.index(dim) for dim in range(x.dim())])[tuple(slice(n) for n in x.shape)]
    return place.copy_(x)


@contextlib.contextmanager
def by_triton() -> Iterator[None]:
    """Every launch by Triton's own launcher; what was kept for launches past it stays."""
    from qwen_fused.kernels import efe_loss as kernels
    from qwen_fused.kernels import launcher

    all_kernels = (kernels.FORWARD, kernels.FINISH, kernels.BACKWARD)
    kept, reason = [kernel.compiled for kernel in all_kernels], launcher.NOT_DIRECT
    launcher.NOT_DIRECT = "asked for"
    for kernel in all_kernels:
        kernel.compiled = {}
    try:
        yield
    finally:
        launcher.NOT_DIRECT = reason
        for kernel, compiled in zip(all_kernels, kept, strict=True):
            kernel.compiled = compiled


def results(case: dict[str, Tensor]) -> list[Tensor]:
    """The loss and its gradients."""
    loss = efe_loss(**case, weights=ALL_TERMS).loss
    return [loss.detach(), *torch.autograd.grad(loss, [case[name] for name in DIFFERENTIABLE])]


def launches(arguments) -> str:
    """Few kernels serve many sizes and memory orders: bit for bit what Triton's launcher gives, in turns."""
    device, draw, calls = torch.device("cpu" if arguments.cpu else "cuda"), random.Random(0), 0
    if device.type == "cuda":
        from qwen_fused.kernels import efe_loss as kernels
        from qwen_fused.kernels import launcher

        assert launcher.NOT_DIRECT is None, launcher.NOT_DIRECT
    for dtype, number in itertools.product((torch.float32, torch.bfloat16), range(CALLS)):
        B, (H, W) = draw.choice((1, 2, 33)), (draw.choice((1, 3, 16, 30)) for _ in range(2))
        made = make_case(B, 2, 10, H, W, dtype=dtype, seed=number).items()
        case = {name: laid(draw, x.to(device)) if draw.random() < 0.6 else x.to(device) for name, x in made}
        for name in DIFFERENTIABLE:
            case[name].requires_grad_()
        found = results(case)
        with by_triton() if device.type == "cuda" else contextlib.nullcontext():
            expected = results(case)
        synchronize(device)
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one, two), f"call {number} in {dtype} of {list(case['plan_logits'].shape)} differs"
        calls += 1
    if device.type == "cuda":
        own = sum(len(kernel.compiled) for kernel in (kernels.FORWARD, kernels.FINISH, kernels.BACKWARD))
        assert own, "no kernel was launched past Triton"
        return f"{calls} calls in memory of any order, {own} kernels: bit for bit as by Triton's launcher"
    return f"{calls} calls in memory of any order, each twice: bitwise equal"
