"""Inputs for the tests of the EFE loss: one seeded builder, so that every backend sees the same cases."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.kernels.reference import TERMS
from qwen_fused.loss.autograd import HARD_MODE
from qwen_fused.loss.dispatch import COMPILED
from qwen_fused.loss.efe_loss import EFEOutput, EFEWeights, efe_loss

# every term on, no two weights alike, so that a swapped or dropped term shows
ALL_TERMS = EFEWeights(ce=1.1, risk=0.9, ambiguity=0.7, agreement=0.5, anchor=0.3, prompt=0.4)
DIFFERENTIABLE = ("plan_logits", "back_logits", "preference_logits", "obs_entropy", "prompt_colors")
CE = EFEWeights(risk=0.0, agreement=0.0, anchor=0.0, prompt=0.0)


def only(name: str, weight: float = 1.0) -> EFEWeights:
    """Weights of one term alone."""
    return EFEWeights(**{**dict.fromkeys(TERMS, 0.0), name: weight})


TERM_SETS = {name: only(name, 1.3) for name in TERMS} | {"all": ALL_TERMS, "default": EFEWeights()}


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


def reference(case: dict[str, Tensor], **options) -> EFEOutput:
    """The specification's answer to a case."""
    return efe_loss(**case, backend="reference", **options)


def assert_agrees(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str, absolute: float = 1e-12) -> None:
    """Largest error against the largest value: 1e-11 for float64, 1e-5 for float32, one rounding for narrower types."""
    assert found.shape == expected.shape, name
    if expected.numel() == 0:
        return
    relative = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype) or torch.finfo(dtype).eps
    scale = expected.abs().max().item()
    error = (found.double().cpu() - expected.cpu()).abs().max().item()
    assert error <= relative * scale + absolute, f"{name}: error {error:.3e} of {scale:.3e}"


def check(case: dict, fused: dict, upstream: float = 1.0, **options) -> dict[str, Tensor]:
    """Loss, reports and every gradient of a backend, which it returns, against the specification in float64."""
    expected, expected_grads = run(with_grad(in_float64(case)), upstream, backend="reference", **options)
    leaves = with_grad(case, fused["device"])
    out, grads = run(leaves, upstream, backend=fused["backend"], **options)
    dtype = case["plan_logits"].dtype
    value = torch.float64 if out.loss.dtype == torch.float64 else torch.float32
    assert_agrees(out.loss.detach(), expected.loss.detach(), value, "loss")
    assert out.terms.keys() == expected.terms.keys()
    for name, term in out.terms.items():
        # a divergence is what is left of logarithms of order 1: it can be no nearer than their rounding
        absolute = torch.finfo(value).eps if name in ("risk", "agreement", "anchor") else 1e-12
        assert_agrees(term, expected.terms[name], value, name, absolute)
        assert not term.requires_grad
    assert_agrees(out.hard_ratio, expected.hard_ratio, value, "hard_ratio")
    assert_agrees(out.accuracy, expected.accuracy, value, "accuracy")
    assert torch.equal(out.solved.cpu(), expected.solved)
    assert torch.equal(out.predicted.cpu(), expected.predicted)
    for name, grad in grads.items():
        if expected_grads[name] is None or grad is None:
            # a term that is off: no gradient, or exactly none
            assert grad is None or not grad.any(), name
            assert expected_grads[name] is None or not expected_grads[name].any(), name
            continue
        assert grad.dtype == leaves[name].dtype
        assert_agrees(grad, expected_grads[name], min(dtype, grad.dtype, key=lambda d: torch.finfo(d).bits), name)
    return grads


def op_arguments(case: dict, hard_mode: str = "cell") -> tuple:
    """The arguments of a forward op for every term of a case, in the order of its schema."""
    names = ("plan_logits", "target", "back_logits", "preference_logits", "anchor_log_probs")
    names += ("obs_entropy", "prompt_colors", "step_weight", "class_weight")
    weights = [getattr(ALL_TERMS, name) for name in TERMS]
    return (*(case[name] for name in names), None, [True] * 6, weights, 0.3, HARD_MODE[hard_mode], -100)


def op_name(fused: dict) -> str:
    """The op that the public function calls."""
    compiled = fused["backend"] == "cpp" or (COMPILED and fused["device"] == "cuda")
    return "efe_loss" if compiled else "efe_loss_triton"
