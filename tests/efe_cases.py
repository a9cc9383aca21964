"""Inputs for the tests of the EFE loss: one seeded builder, so that every backend sees the same cases."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.ops import EFEWeights

# every term on, no two weights alike, so that a swapped or dropped term shows
ALL_TERMS = EFEWeights(ce=1.1, risk=0.9, ambiguity=0.7, agreement=0.5, anchor=0.3, prompt=0.4)
DIFFERENTIABLE = ("plan_logits", "back_logits", "preference_logits", "obs_entropy", "prompt_colors")


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


def with_grad(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same case on fresh leaves that require grad."""
    return {name: _leaf(x) if name in DIFFERENTIABLE else x for name, x in case.items()}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def gradients(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """What backward left on the case's leaves."""
    return {name: case[name].grad for name in DIFFERENTIABLE if name in case}
