"""The specification of the EFE loss against torch's own losses, hand-computed values and its identities."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from efe_cases import ALL_TERMS, CE, DIFFERENTIABLE, gradients, make_case, only, reference, with_grad
from torch.testing import assert_close

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEWeights


def valid_cells(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[C, H, W] -> [cells, C] of the valid cells."""
    return x.permute(1, 2, 0)[valid]


@pytest.mark.parametrize("class_weight", [None, torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)])
@pytest.mark.parametrize("ignored", [0, 3])
def test_is_cross_entropy(class_weight, ignored):
    logits = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 4, (11,))
    target[:ignored] = -100
    out = hard_cell_cross_entropy(logits, target, class_weight=class_weight, hard_mode="none")
    expected = F.cross_entropy(logits, target, weight=class_weight)
    assert_close(out.loss, expected)
    (grad,) = torch.autograd.grad(out.loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert_close(grad, expected_grad)
    assert_close(out.predicted[ignored:].long(), logits[ignored:].argmax(1))
    assert (out.predicted[:ignored] == 255).all()


def test_step_weighted_cross_entropy():
    case = make_case(weighted=True)
    out = reference(case, weights=CE, hard_mode="none")
    expected = []
    for plan, target in zip(case["plan_logits"], case["target"], strict=True):
        steps = [F.cross_entropy(x[None], target[None], weight=case["class_weight"]) for x in plan]
        expected.append((torch.stack(steps) * case["step_weight"]).sum())
    assert_close(out.terms["ce"], torch.stack(expected))
    assert_close(out.loss, torch.stack(expected).mean())


def test_only_the_last_step_without_step_weights():
    case = make_case(weighted=False)
    out = reference(case, weights=CE, hard_mode="none")
    alone = F.cross_entropy(case["plan_logits"][0, -1][None], case["target"][:1])
    assert_close(out.terms["ce"][0], alone)


def test_divergences_are_kl_div():
    case = make_case(B=3, weighted=False)
    out = reference(case, weights=ALL_TERMS)
    for b in range(3):
        valid = case["target"][b] != -100
        n = valid.sum()
        log_p = valid_cells(case["preference_logits"][b], valid).log_softmax(1)
        log_a = valid_cells(case["anchor_log_probs"], valid)
        risk, agreement = 0.0, 0.0
        for plan, back in zip(case["plan_logits"][b], case["back_logits"][b], strict=True):
            log_q, log_r = (valid_cells(x, valid).log_softmax(1) for x in (plan, back))
            log_m = ((log_q.exp() + log_r.exp()) / 2).log()
            risk += F.kl_div(log_p, log_q, reduction="sum", log_target=True)
            agreement += 0.5 * F.kl_div(log_m, log_q, reduction="sum", log_target=True)
            agreement += 0.5 * F.kl_div(log_m, log_r, reduction="sum", log_target=True)
        assert_close(out.terms["risk"][b], risk / n)
        assert_close(out.terms["agreement"][b], agreement / n)
        assert_close(out.terms["anchor"][b], F.kl_div(log_a, log_p, reduction="sum", log_target=True) / n)


def test_prompt_is_cosine_similarity():
    case = make_case(weighted=False)
    out = reference(case, weights=only("prompt"), hard_mode="none")
    for b in range(2):
        valid = case["target"][b] != -100
        pooled = torch.stack([valid_cells(x, valid).mean(0) for x in case["plan_logits"][b]])
        expected = -F.cosine_similarity(pooled, case["prompt_colors"][b][None], dim=1).mean()
        assert_close(out.terms["prompt"][b], expected)


def test_hand_computed_values():
    # q = (1/4, 3/4), r = (3/4, 1/4), p = (1/2, 1/2), anchor = (1/4, 3/4): one cell, one step
    case = {
        "plan_logits": torch.tensor([0.0, log(3)], dtype=torch.float64).view(1, 1, 2, 1, 1),
        "target": torch.zeros(1, 1, 1, dtype=torch.long),
        "back_logits": torch.tensor([log(3), 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1),
        "preference_logits": torch.zeros(1, 2, 1, 1, dtype=torch.float64),
        "anchor_log_probs": torch.tensor([0.25, 0.75], dtype=torch.float64).log().view(2, 1, 1),
        "obs_entropy": torch.tensor([2.0, 4.0], dtype=torch.float64),
        "prompt_colors": torch.tensor([[0.0, 5.0]], dtype=torch.float64),
    }
    expected = {
        "ce": log(4),
        "risk": log(2) - 0.25 * log(4) - 0.75 * log(4 / 3),
        "ambiguity": 3.5,
        "agreement": log(2) - 0.25 * log(4) - 0.75 * log(4 / 3),
        "anchor": 0.5 * log(2) + 0.5 * log(2 / 3),
        "prompt": -1.0,
        "hard": 1.0,
    }
    out = reference(case, weights=ALL_TERMS, hard_mode="none")
    assert {name: term.item() for name, term in out.terms.items()} == pytest.approx(expected, rel=1e-12)
    total = sum(getattr(ALL_TERMS, name) * value for name, value in expected.items() if name != "hard")
    assert out.loss.item() == pytest.approx(total, rel=1e-12)
    assert out.predicted.item() == 1


def test_disjoint_plans_disagree_by_log_two():
    plan = torch.tensor([0.0, -torch.inf], dtype=torch.float64).view(1, 1, 2, 1, 1)
    out = reference(
        {"plan_logits": plan, "target": torch.zeros(1, 1, 1, dtype=torch.long), "back_logits": plan.flip(2)}
    )
    assert out.terms["agreement"].item() == pytest.approx(log(2), rel=1e-12)
    assert out.loss.item() == pytest.approx(0.5 * 0.5 * log(2), rel=1e-12)


def test_risk_and_ambiguity_are_minus_utility_and_information_gain():
    case = make_case(B=3, C=6)
    terms = reference(case, weights=ALL_TERMS).terms
    valid = case["target"] != -100
    log_q = case["plan_logits"].log_softmax(2)
    log_p = case["preference_logits"].log_softmax(1)[:, None]
    h = case["obs_entropy"][:, None, None]
    q = log_q.exp()
    utility = (q * log_p * valid[:, None, None]).sum((1, 2, 3, 4))
    information_gain = (-(q * log_q) * valid[:, None, None] - q * h * valid[:, None, None]).sum((1, 2, 3, 4))
    expected = -(utility + information_gain) / valid.sum((1, 2))
    assert_close(terms["risk"] + terms["ambiguity"], expected)


@pytest.mark.parametrize(("hard_mode", "scale"), [("episode", 0.25 + 0.75 / 4), ("none", 1.0)])
def test_hard_modes_scale_the_episode(hard_mode, scale):
    # four cells with q(class 1) = 3/4; one is labelled 0, hence wrong
    logits = torch.tensor([0.0, log(3)], dtype=torch.float64).repeat(4, 1)
    out = hard_cell_cross_entropy(logits, torch.tensor([0, 1, 1, 1]), hard_floor=0.25, hard_mode=hard_mode)
    ce = (log(4) + 3 * log(4 / 3)) / 4
    assert out.hard_ratio.item() == 0.25
    assert out.accuracy.item() == 0.75
    assert out.terms["ce"].item() == pytest.approx(ce, rel=1e-12)
    assert out.loss.item() == pytest.approx(scale * ce, rel=1e-12)


def test_cell_mode_weights_each_cell():
    logits = torch.tensor([0.0, log(3)], dtype=torch.float64).repeat(4, 1)
    # 0.3 is no binary fraction: a float32 on the way would show
    out = hard_cell_cross_entropy(logits, torch.tensor([0, 1, 1, 1]), hard_floor=0.3, hard_mode="cell")
    expected = (log(4) + 0.3 * 3 * log(4 / 3)) / 4
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert out.terms["ce"].item() == pytest.approx(expected, rel=1e-12)


def test_hard_ratio_is_not_differentiated():
    case = with_grad(make_case())
    out = reference(case, weights=ALL_TERMS, hard_floor=0.25)
    out.loss.backward()
    scaled = gradients(case)
    plain_case = with_grad(make_case())
    plain = reference(plain_case, weights=ALL_TERMS, hard_mode="none")
    sigma = 0.25 + 0.75 * out.hard_ratio
    plain_case["plan_logits"].grad = None
    plain.loss.backward()
    expected = gradients(plain_case)
    assert_close(scaled["plan_logits"], expected["plan_logits"] * sigma.view(-1, 1, 1, 1, 1))
    assert_close(scaled["preference_logits"], expected["preference_logits"] * sigma.view(-1, 1, 1, 1))


def test_ties_go_to_the_lowest_class():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    out = hard_cell_cross_entropy(logits, torch.tensor([0, 2]))
    assert out.predicted.tolist() == [0, 1]
    assert out.hard_ratio.item() == 0.5


def test_mean_is_over_episodes_with_cells():
    case = make_case(B=3, T=2)
    case["target"][1] = -100
    rest = {k: x[[0, 2]] if x.shape[0] == 3 and k != "step_weight" else x for k, x in case.items()}
    out, expected = reference(case, weights=ALL_TERMS), reference(rest, weights=ALL_TERMS)
    assert_close(out.loss, expected.loss)
    assert out.hard_ratio[1] == 0 and out.accuracy[1] == 0 and not out.solved[1]
    assert (out.predicted[1] == 255).all()


def test_solved():
    logits = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    target = torch.tensor([0, 1, 2, 0, 1, -100])
    assert hard_cell_cross_entropy(logits, target).solved.item()
    target[1] = 0
    assert not hard_cell_cross_entropy(logits, target).solved.item()


@pytest.mark.parametrize("hard_mode", ["episode", "cell", "none"])
@pytest.mark.parametrize("forbidden", [0.0, 0.3])
def test_gradcheck(hard_mode, forbidden):
    case = with_grad(make_case(B=2, T=2, C=3, H=1, W=2, seed=3))
    names = [name for name in DIFFERENTIABLE if name in case]
    mask = torch.zeros_like(case["plan_logits"][:, 0], dtype=torch.bool)
    if forbidden:
        # finite differences need finite leaves: forbid a class inside the checked function
        mask[:, 2, 0, 0] = True
        case["target"][:, 0, 0] = 0

    def loss(*leaves):
        inputs = dict(zip(names, leaves, strict=True))
        inputs["preference_logits"] = inputs["preference_logits"].masked_fill(mask, -torch.inf)
        for name in ("plan_logits", "back_logits"):
            inputs[name] = inputs[name].masked_fill(mask[:, None], -torch.inf)
        return reference({**case, **inputs}, weights=ALL_TERMS, hard_mode=hard_mode).loss

    assert torch.autograd.gradcheck(loss, [case[name] for name in names])


def test_terms_reported():
    case = make_case()
    assert set(reference(case).terms) == {"ce", "hard", "risk", "agreement", "anchor", "prompt"}
    assert set(reference(case, weights=only("risk")).terms) == {"ce", "hard", "risk"}
    alone = {"plan_logits": case["plan_logits"], "target": case["target"]}
    assert set(reference(alone, weights=ALL_TERMS).terms) == {"ce", "hard"}
    assert not any(term.requires_grad for term in reference(with_grad(case)).terms.values())


def test_a_dropped_term_is_not_computed():
    case = make_case()
    case["back_logits"].fill_(torch.nan)
    assert reference(case, weights=EFEWeights(agreement=0.0)).loss.isfinite()


def test_weights_are_linear():
    case = make_case()
    out = reference(case, weights=ALL_TERMS, hard_mode="none")
    total = sum(getattr(ALL_TERMS, name) * term for name, term in out.terms.items() if name != "hard")
    assert_close(out.loss, total.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_accumulates_in_float32(dtype):
    case = with_grad(make_case(H=6, W=6, dtype=dtype))
    out = reference(case, weights=ALL_TERMS)
    out.loss.backward()
    exact = with_grad({k: x.detach().double() if x.is_floating_point() else x for k, x in case.items()})
    expected = reference(exact, weights=ALL_TERMS)
    expected.loss.backward()
    assert out.loss.dtype == torch.float32
    assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, grad in gradients(case).items():
        assert grad.dtype == dtype
        assert_close(grad.double(), gradients(exact)[name], rtol=tolerance, atol=1e-7)


def test_inputs_are_not_modified():
    case = make_case(forbidden=0.2)
    before = {name: x.clone() for name, x in case.items()}
    reference(with_grad(case), weights=ALL_TERMS).loss.backward()
    for name, x in case.items():
        assert torch.equal(x, before[name]), name
