"""The edge rules of the EFE loss's specification: ignored cells, forbidden classes, NaN, nothing valid, odd targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import ALL_TERMS, CE, DIFFERENTIABLE, gradients, make_case, only, reference, with_grad
from torch.testing import assert_close

from qwen_fused.kernels.reference import efe_loss_reference
from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_ignored_cells_change_nothing(poison):
    clean = with_grad(make_case())
    expected = reference(clean, weights=ALL_TERMS)
    expected.loss.backward()
    dirty = make_case()
    ignored = dirty["target"] == -100
    assert ignored.any(1).any(1).all()
    for name in ("plan_logits", "back_logits"):
        dirty[name].masked_fill_(ignored[:, None, None], poison)
    dirty["preference_logits"].masked_fill_(ignored[:, None], poison)
    dirty = with_grad(dirty)
    out = reference(dirty, weights=ALL_TERMS)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    for name, grad in gradients(dirty).items():
        assert torch.equal(grad, gradients(clean)[name]), name
    assert (dirty["plan_logits"].grad.movedim(2, -1).movedim(1, -1)[ignored] == 0).all()
    assert (dirty["preference_logits"].grad.movedim(1, -1)[ignored] == 0).all()


def test_anchor_in_a_cell_that_every_episode_ignores():
    case = make_case()
    case["target"][:, 0, 0] = -100
    expected = reference(case, weights=ALL_TERMS).loss
    case["anchor_log_probs"][:, 0, 0] = torch.nan
    assert torch.equal(reference(case, weights=ALL_TERMS).loss, expected)


@pytest.mark.parametrize("name", ["plan_logits", "back_logits", "preference_logits"])
def test_nan_in_a_valid_cell_is_not_hidden(name):
    case = make_case(ignored=0.0)
    case[name][0, 0, ..., 1, 1] = torch.nan
    assert reference(case, weights=ALL_TERMS).loss.isnan()


def test_forbidden_classes_give_finite_gradients_and_none_to_themselves():
    case = with_grad(make_case(forbidden=0.3))
    out = reference(case, weights=ALL_TERMS)
    out.loss.backward()
    assert out.loss.isfinite()
    for name, grad in gradients(case).items():
        assert grad.isfinite().all(), name
        assert (grad[case[name].detach() == -torch.inf] == 0).all(), name


def test_a_preference_that_forbids_a_live_class_is_infinitely_risky():
    case = make_case(ignored=0.0)
    case["preference_logits"][0, 1] = -torch.inf
    assert reference(case, weights=only("risk")).terms["risk"].tolist()[0] == torch.inf


def test_a_class_that_preference_and_anchor_forbid_costs_nothing():
    case = make_case(ignored=0.0)
    case["target"][:] = 0
    for name in ("plan_logits", "back_logits", "preference_logits"):
        case[name][:, ..., 1, :, :] = -torch.inf
    case["anchor_log_probs"][1] = -torch.inf
    case = with_grad(case)
    out = reference(case, weights=ALL_TERMS)
    out.loss.backward()
    assert out.loss.isfinite() and out.terms["anchor"].isfinite().all()
    assert (case["preference_logits"].grad[:, 1] == 0).all() and case["preference_logits"].grad.isfinite().all()


def test_forbidden_target_counts_only_where_it_has_weight():
    case = make_case(ignored=0.0)
    case["target"][:] = 2
    case["plan_logits"][:, 0, 2] = -torch.inf
    case["step_weight"] = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert reference(case, weights=CE).loss.isfinite()
    case["step_weight"][0] = 1e-3
    assert reference(case, weights=CE).loss == torch.inf


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (1, 1, 1, 1, 1), (2, 1, 3, 1, 1), (2, 2, 3, 0, 4)])
def test_small_shapes(shape):
    B, T, C, H, W = shape
    case = with_grad(make_case(B, T, C, H, W, ignored=0.0))
    out = reference(case, weights=ALL_TERMS)
    out.loss.backward()
    assert out.loss.isfinite() and out.loss.dim() == 0
    assert out.predicted.shape == (B, H, W) and out.solved.shape == (B,)
    if B * H * W == 0:
        assert out.loss == 0
    for name, grad in gradients(case).items():
        assert grad.shape == case[name].shape and grad.isfinite().all(), name


def test_all_ignored_is_zero_with_zero_gradients():
    case = make_case()
    case["target"][:] = -100
    for name in DIFFERENTIABLE:
        case[name].fill_(torch.nan)
    case["obs_entropy"].fill_(1.0)
    case = with_grad(case)
    out = reference(case, weights=ALL_TERMS)
    out.loss.backward()
    assert out.loss == 0
    for name, grad in gradients(case).items():
        assert (grad == 0).all(), name


def test_target_out_of_range():
    case = make_case(ignored=0.0)
    case["target"][1, 0, 0] = 5
    case["target"][1, 0, 1] = -7
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\).*got 5 \(2 cells outside\)"):
        reference(case)
    # where the check would cost a sync, the specification says NaN for that episode alone
    weights = {name: getattr(ALL_TERMS, name) for name in ("ce", "risk", "anchor", "agreement", "prompt")}
    weights["ambiguity"] = 0.0
    plan = case["plan_logits"].requires_grad_()
    loss, *_ = efe_loss_reference(plan, case["target"], weights=weights)
    loss.backward()
    assert loss.isnan()
    assert plan.grad[1, -1].isnan().all() and plan.grad[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_target_dtypes(dtype):
    case = make_case()
    expected = reference(case).loss
    case["target"] = case["target"].clone()
    if dtype == torch.uint8:
        case["target"][case["target"] == -100] = 255
    case["target"] = case["target"].to(dtype)
    ignore_index = 255 if dtype == torch.uint8 else -100
    assert torch.equal(reference(case, ignore_index=ignore_index).loss, expected)


def test_ignore_index_may_be_a_class():
    logits = torch.randn(9, 3, dtype=torch.float64)
    target = torch.randint(0, 3, (9,))
    out = hard_cell_cross_entropy(logits, target, ignore_index=1, hard_mode="none")
    assert_close(out.loss, F.cross_entropy(logits, target, ignore_index=1))
