"""Numbers at the end of their range: what is finite stays finite, and what can't be negative is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import TERM_SETS, assert_agrees, check, make_case, only

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import efe_loss

LOWEST = torch.finfo(torch.float32).min


def risk_of(fused, low: float, dtype: torch.dtype, backend: str) -> tuple:
    """Loss and both gradients of one cell whose third class the preference puts `low` down, and the plan 70."""
    plan = torch.tensor([0.0, 1.0, -70.0], dtype=dtype, device=fused["device"]).view(1, 1, 3, 1, 1).requires_grad_()
    preference = torch.tensor([0.0, 0.5, low], dtype=dtype, device=fused["device"]).view(1, 3, 1, 1).requires_grad_()
    target = torch.ones(1, 1, 1, dtype=torch.long, device=fused["device"])
    out = efe_loss(plan, target, preference_logits=preference, weights=only("risk"), hard_mode="none", backend=backend)
    return out.loss.detach(), *torch.autograd.grad(out.loss, (plan, preference))


@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, low) for low in (-1e29, -6e29, -8e29, -1e30, -1e31, -2.4e38, LOWEST)]
    + [(torch.float64, low) for low in (-1e30, -1e31, -1e100, -1e300)],
)
def test_only_minus_infinity_is_forbidden(fused, dtype, low):
    """A finite preference costs q times its distance, however far down it is."""
    found, expected = risk_of(fused, low, dtype, fused["backend"]), risk_of(fused, low, torch.float64, "reference")
    for x, y, name in zip(found, expected, ("loss", "plan", "preference"), strict=True):
        assert x.isfinite().all(), name
        assert_agrees(x.cpu(), y.cpu(), dtype, name)
    assert risk_of(fused, -torch.inf, dtype, fused["backend"])[0] == torch.inf


def test_a_preference_may_be_exactly_where_a_mark_would_be(fused):
    """No finite distance stands for -inf, whatever its value."""
    for low in (-1e30, 1.5 - 1e30, -200.0, -1100.0, 1.5):
        assert risk_of(fused, low, torch.float32, fused["backend"])[0].isfinite()


@pytest.mark.parametrize("low", [-2.3e38, -2.4e38, LOWEST])
def test_cross_entropy_of_a_target_far_down(fused, low):
    """As of a true class that somebody masked with torch.finfo(torch.float32).min."""
    logits = torch.tensor([[0.0, 1.0, low]], device=fused["device"], requires_grad=True)
    target = torch.tensor([2], device=fused["device"])
    found = hard_cell_cross_entropy(logits, target, hard_mode="none", backend=fused["backend"]).loss
    expected = F.cross_entropy(logits, target)
    assert expected.isfinite()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (found, expected)))


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e20), (torch.float32, 3e38), (torch.float64, 1e200)])
@pytest.mark.parametrize("name", ["plan_logits", "prompt_colors"])
def test_cosine_of_huge_logits(fused, name, dtype, scale, backend):
    """The angle between two vectors is that of their directions: neither infinite nor 0 where squares overflow."""
    case = make_case(H=3, W=3, ignored=0.2)
    case["plan_logits"] = (
        case["plan_logits"].abs().clamp(0.1, 1.0) * torch.tensor([1.0, 0.5, 0.2, 0.7, 0.1])[:, None, None]
    )
    small = efe_loss(**case, weights=only("prompt"), backend="reference")
    case[name] = scale * case[name] / case[name].abs().max()
    case = {
        key: x.to(dtype).to(fused["device"]) if x.is_floating_point() else x.to(fused["device"])
        for key, x in case.items()
    }
    huge = case[name].requires_grad_()
    backend = fused["backend"] if backend == "fused" else backend
    out = efe_loss(**case, weights=only("prompt"), backend=backend)
    assert_agrees(out.loss.detach(), small.loss, dtype, "loss")
    (grad,) = torch.autograd.grad(out.loss, huge)
    assert grad.isfinite().all() and (scale > 1e30 or grad.any())


def test_eps_of_the_cosine_is_not_rounded(fused):
    """1e-8 is no float32: in float64 a norm under it shows the difference."""
    case = {name: x.to(fused["device"]) for name, x in make_case().items()}
    case["prompt_colors"] = 1e-11 * case["prompt_colors"]
    found, right = (efe_loss(**case, weights=only("prompt"), backend=b).loss for b in (fused["backend"], "reference"))
    assert abs(found.item() / right.item() - 1) < 1e-13


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_divergences_are_never_negative(fused, backend):
    """Plans that are what they are compared with, or nearly: rounding alone would leave a sign."""
    g = torch.Generator().manual_seed(0)
    backend, below = fused["backend"] if backend == "fused" else backend, 0
    for scale in (1.0, 5.0, 30.0):
        for shift in (0.0, 1e-4, 1e-3):
            plan = scale * torch.randn(4, 3, 10, 3, 3, generator=g)
            plan[:, 1:] = plan[:, :1]
            case = {
                "plan_logits": plan,
                "back_logits": plan + shift * torch.randn(plan.shape, generator=g),
                "preference_logits": plan[:, 0].clone(),
                "anchor_log_probs": plan[0, 0].log_softmax(0),
                "target": torch.zeros(4, 3, 3, dtype=torch.long),
            }
            case = {name: x.to(fused["device"]) for name, x in case.items()}
            terms = efe_loss(**case, backend=backend).terms
            for name in ("risk", "agreement", "anchor"):
                assert (terms[name] >= 0).all(), (name, scale, shift)
            below += sum(int((terms[name] == 0).sum()) for name in ("risk", "agreement", "anchor"))
    # some were below
    assert below > 0


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cross_entropy_is_never_negative(fused, backend, dtype):
    """Of classes that are all but sure, however large their logits."""
    # a GPU's logarithm is one instruction, exact to 2^-22: two steps of it
    least = -(2.0**-21) if fused["device"] == "cuda" else 0.0
    g = torch.Generator().manual_seed(0)
    for scale in (20.0, 40.0, 100.0, 300.0):
        plan, target = torch.randn(2, 2, 10, 3, 3, generator=g), torch.randint(0, 10, (2, 3, 3), generator=g)
        plan.scatter_(2, target[:, None, None].expand(-1, 2, -1, -1, -1), scale)
        case = {"plan_logits": plan.to(dtype), "target": target, "step_weight": torch.ones(2)}
        case = {name: x.to(fused["device"]) for name, x in case.items()}
        out = efe_loss(**case, backend=fused["backend"] if backend == "fused" else backend)
        assert (out.terms["ce"] >= least).all() and out.loss >= least and (out.terms["ce"] < 1e-5).all(), scale


def test_an_anchor_need_not_add_up_to_one(fused):
    """Its divergence may then be negative, and is told as it is."""
    case = make_case()
    case["anchor_log_probs"] = case["anchor_log_probs"] + 5.0
    check(case, fused, weights=TERM_SETS["anchor"])
    moved = {name: x.to(fused["device"]) for name, x in case.items()}
    assert (efe_loss(**moved, weights=TERM_SETS["anchor"], backend=fused["backend"]).terms["anchor"] < 0).all()


@pytest.mark.parametrize("spread", [1.0, 30.0, 600.0])
def test_float64_to_its_last_digits(fused, spread):
    """exp and log of our own: no worse than torch's by more than a few roundings."""
    case = make_case(B=1, T=2, C=7, H=7, W=9, ignored=0.0)
    for name in ("plan_logits", "back_logits", "preference_logits"):
        case[name] = spread * case[name] / 6
    moved = {name: x.to(fused["device"]) for name, x in case.items()}
    found, right = (efe_loss(**moved, backend=b).terms for b in (fused["backend"], "reference"))
    for name in ("ce", "risk", "agreement", "anchor"):
        assert abs(found[name].item() / right[name].item() - 1) < 2e-14, name


def test_class_weights_that_are_all_0(fused):
    """Ours is 0, as of an episode without cells, where torch divides 0 by 0."""
    logits = torch.randn(4, 3, device=fused["device"], requires_grad=True)
    target = torch.tensor([0, 0, 1, 1], device=fused["device"])
    weight = torch.tensor([0.0, 0.0, 1.0], device=fused["device"])
    out = hard_cell_cross_entropy(logits, target, class_weight=weight, hard_mode="none", backend=fused["backend"])
    assert out.loss == 0 and F.cross_entropy(logits, target, weight=weight).isnan()
    assert not torch.autograd.grad(out.loss, logits)[0].any()
