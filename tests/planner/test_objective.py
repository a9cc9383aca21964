"""The objective: its curriculum, its parameters alive from the start, reversibility, and the anchor's movement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_fused.loss.efe_loss import EFEWeights
from qwen_fused.planner.agent import Plan
from qwen_fused.planner.objective import PlanObjective

B, T, C, H, W, D = 3, 2, 10, 4, 5, 8
ALL = EFEWeights(ce=1.0, risk=1.0, ambiguity=0.3, agreement=0.5, anchor=0.2, prompt=0.3)


def make(**changes) -> PlanObjective:
    return PlanObjective(**{**dict(prompt_dim=D, steps=T, backend="reference", weights=ALL), **changes})


@pytest.fixture
def case() -> dict:
    plan = Plan(
        torch.randn(B, T, C, H, W, requires_grad=True),
        torch.randn(B, T, C, H, W, requires_grad=True),
        torch.randn(B, C, H, W, requires_grad=True),
        torch.randn(B, 6),
    )
    grids = [torch.randint(0, C, (B, H, W)) for _ in range(2)]
    return dict(
        plan=plan,
        size_logits=torch.randn(B, 2, 30, requires_grad=True),
        prompt=torch.randn(B, D, requires_grad=True),
        query=grids[0],
        target=grids[1],
        size=torch.tensor([[H, W]] * B),
    )


def test_size_share_is_a_ratio_that_falls_after_epoch_0(case):
    objective = make()
    first, later = objective(**case, epoch=0), objective(**case, epoch=1)
    plan_loss = first.efe.loss + 0.4 * first.reversibility
    torch.testing.assert_close(first.loss, 0.4 * plan_loss + 0.6 * first.size)
    torch.testing.assert_close(later.loss, 0.7 * plan_loss + 0.3 * first.size)


def test_size_loss_is_the_cross_entropy_of_both_sides(case):
    logits, size = case["size_logits"], case["size"]
    expected = F.cross_entropy(logits[:, 0], size[:, 0] - 1) + F.cross_entropy(logits[:, 1], size[:, 1] - 1)
    torch.testing.assert_close(make()(**case, epoch=0).size, expected.detach())


def test_reversibility_is_the_cross_entropy_of_the_reconstructed_query(case):
    expected = F.cross_entropy(case["plan"].back_input, case["query"])
    torch.testing.assert_close(make()(**case, epoch=0).reversibility, expected.detach())
    case["plan"].back_logits = case["plan"].back_input = None
    assert make()(**case, epoch=0).reversibility == 0


def test_every_parameter_exists_at_construction_and_gets_a_gradient(case):
    objective = make()
    before = {name: p.data_ptr() for name, p in objective.named_parameters()}
    objective(**case, epoch=0).loss.backward()
    assert before == {name: p.data_ptr() for name, p in objective.named_parameters()}
    assert [n for n, p in objective.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []
    plan = case["plan"]
    leaves = [plan.logits, plan.back_logits, plan.back_input, case["size_logits"], case["prompt"]]
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_early_steps_have_a_gradient_from_the_cross_entropy_alone(case):
    only_ce = EFEWeights(ce=1.0, risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)
    for weight, alive in ((0.1, True), (0.0, False)):
        logits = case["plan"].logits
        loss = make(weights=only_ce, early_step_weight=weight)(**case, epoch=0).loss
        grad = torch.autograd.grad(loss, logits)[0]
        assert (grad[:, 0].abs().sum() > 0) == alive and grad[:, 1].abs().sum() > 0


def test_a_dropped_term_leaves_no_dead_parameters():
    none = EFEWeights(ce=1.0, risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)
    assert list(make(weights=none).parameters()) == []


def test_preference_depends_on_the_prompt(case):
    objective = make()
    a, b = (objective.preference_logits(torch.randn(B, D), H, W) for _ in range(2))
    assert a.shape == (B, C, H, W) and not torch.equal(a, b)


def test_observation_entropy_is_that_of_its_rows():
    objective = make()
    expected = torch.distributions.Categorical(logits=objective.observation).entropy()
    torch.testing.assert_close(objective.observation_entropy(), expected)


def test_anchor_moves_towards_solved_outcomes_only(case):
    objective = make()
    start = objective.anchor.clone()
    objective.update_anchor(case["target"], torch.zeros(B, dtype=torch.bool))
    torch.testing.assert_close(objective.anchor, start)
    solved = torch.tensor([True, False, False])
    objective.update_anchor(case["target"], solved)
    rate = 0.05 + 0.15 / 3
    expected = (1 - rate) * 0.1 + rate * F.one_hot(case["target"][0], C).permute(2, 0, 1).float()
    torch.testing.assert_close(objective.anchor[:, :H, :W], expected)
    assert torch.equal(objective.anchor[:, H:], start[:, H:])
    assert torch.equal(objective.anchor[:, :, W:], start[:, :, W:])


def test_anchor_stays_a_distribution_with_a_finite_log(case):
    objective = make()
    for _ in range(200):
        objective.update_anchor(torch.zeros(B, H, W, dtype=torch.int64), torch.ones(B, dtype=torch.bool))
    torch.testing.assert_close(objective.anchor.sum(0), torch.ones(30, 30))
    assert objective.anchor.log().isfinite().all() and objective.anchor[0, 0, 0] > 0.99


def test_anchor_is_in_the_state_dict_and_carries_no_gradient(case):
    objective = make()
    assert "anchor" in objective.state_dict() and not objective.anchor.requires_grad
