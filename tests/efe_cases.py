"""Inputs for the tests of the EFE loss: one seeded builder, so that every backend sees the same cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_fused import backends
from qwen_fused.ops import COMPILED, EFEOutput, EFEWeights, efe_loss

# every term on, no two weights alike, so that a swapped or dropped term shows
ALL_TERMS = EFEWeights(ce=1.1, risk=0.9, ambiguity=0.7, agreement=0.5, anchor=0.3, prompt=0.4)
DIFFERENTIABLE = ("plan_logits", "back_logits", "preference_logits", "obs_entropy", "prompt_colors")

# Triton runs on the GPU where there is one, and under its interpreter where there is none
FUSED = [
    pytest.param(
        ("cpp", "cpu"),
        id="cpp",
        marks=pytest.mark.skipif(not COMPILED, reason=f"no extension: {backends.EXTENSION_ERROR}"),
    ),
    pytest.param(
        ("triton", "cpu"),
        id="triton-interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is compiled"),
    ),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


def make_case(
    B: int = 2,
    T: int = 3,
    C: int = 5,
    H: int = 4,
    W: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    ignored: float = 0.25,
    forbidden: float = 0.0,
    weighted: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Keyword arguments of `efe_loss` with every input there; `forbidden` is the share of -inf logits.

    A forbidden class is forbidden in plan, back and preference alike and is never the target, so that the
    loss stays finite.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    target = torch.randint(0, C, (B, H, W), generator=g)
    plan, back, preference = 2 * normal(B, T, C, H, W), 2 * normal(B, T, C, H, W), normal(B, C, H, W)
    if forbidden:
        out = torch.rand(B, C, H, W, generator=g) < forbidden
        out.scatter_(1, target[:, None], False)
        plan.masked_fill_(out[:, None], -torch.inf)
        back.masked_fill_(out[:, None], -torch.inf)
        preference.masked_fill_(out, -torch.inf)
    target[torch.rand(B, H, W, generator=g) < ignored] = -100
    case = {
        "plan_logits": plan,
        "target": target,
        "back_logits": back,
        "preference_logits": preference,
        "anchor_log_probs": normal(C, H, W).log_softmax(0),
        "obs_entropy": torch.rand(C, generator=g, dtype=torch.float64),
        "prompt_colors": normal(B, C),
    }
    if weighted:
        case["step_weight"] = torch.rand(T, generator=g, dtype=torch.float64) + 0.1
        case["class_weight"] = torch.rand(C, generator=g, dtype=torch.float64) + 0.1
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}


def with_grad(case: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """The same case on fresh leaves that require grad; strides are kept."""
    moved = {name: x if x.device.type == device else x.to(device) for name, x in case.items()}
    return {name: x.detach().requires_grad_() if name in DIFFERENTIABLE else x for name, x in moved.items()}


def in_float64(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, exactly."""
    return {name: x.detach().double() if x.is_floating_point() else x for name, x in case.items()}


def gradients(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """What backward left on the case's leaves."""
    return {name: case[name].grad for name in DIFFERENTIABLE if name in case}


def run(case: dict[str, Tensor], upstream: float = 1.0, **options) -> tuple[EFEOutput, dict[str, Tensor]]:
    """Loss and gradients of a case whose leaves require grad."""
    out = efe_loss(**case, **options)
    (upstream * out.loss).backward()
    return out, gradients(case)


def assert_agrees(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str, absolute: float = 1e-12) -> None:
    """Largest error against the largest value: 1e-11 for float64, 1e-5 for float32, one rounding for narrower types."""
    assert found.shape == expected.shape, name
    if expected.numel() == 0:
        return
    relative = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype) or torch.finfo(dtype).eps
    scale = expected.abs().max().item()
    error = (found.double().cpu() - expected).abs().max().item()
    assert error <= relative * scale + absolute, f"{name}: error {error:.3e} of {scale:.3e}"
