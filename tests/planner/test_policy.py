"""The policy: a true density, two live gradients, a bounded step, and no noise when it is evaluated."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from qwen_fused.planner.policy import PromptPolicy, squashed_log_prob

B, D, F = 6, 8, 5


@pytest.fixture
def policy() -> PromptPolicy:
    return PromptPolicy(prompt_dim=D, features=3, state_dim=F, hidden=16)


@pytest.fixture
def state() -> tuple[torch.Tensor, ...]:
    return torch.randn(B, D, requires_grad=True), torch.randn(B, D), torch.randn(B, 3)


def test_log_prob_is_that_of_the_squashed_gaussian():
    mean, log_std = torch.randn(B, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64) * 0.3
    u = mean + torch.randn_like(mean)
    squashed = TransformedDistribution(
        Normal(mean, log_std.exp().expand_as(mean)), [TanhTransform(), AffineTransform(0.0, 0.2)]
    )
    expected = squashed.log_prob(0.2 * u.tanh()).mean(1)
    torch.testing.assert_close(squashed_log_prob(u, mean, log_std, 0.2), expected, rtol=1e-8, atol=1e-8)


def test_log_prob_stays_finite_far_out():
    value = squashed_log_prob(torch.tensor([[40.0, -40.0]]), torch.zeros(1, 2), torch.zeros(2), 0.2)
    assert value.isfinite().all()


def test_step_is_bounded_and_gated(policy, state):
    action = policy(*state, sample=True)
    assert action.delta.abs().max() <= policy.delta_scale
    assert ((action.gate > 0) & (action.gate < 1)).all()
    torch.testing.assert_close(action.refined, state[0] + action.gate * action.delta)


def test_evaluation_has_no_noise(policy, state):
    rng = torch.get_rng_state()
    first, second = policy(*state, sample=False), policy(*state, sample=False)
    assert torch.equal(first.refined, second.refined)
    assert torch.equal(rng, torch.get_rng_state())
    assert not torch.equal(policy(*state, sample=True).refined, policy(*state, sample=True).refined)


def test_both_gradients_are_live(policy, state):
    action = policy(*state, sample=True)
    pathwise = torch.autograd.grad(action.refined.square().sum(), policy.mean.weight, retain_graph=True)[0]
    reward = torch.randn(B)
    score = policy.loss(action, reward, torch.randn(B, F), torch.randn(B, F)).score
    by_score = torch.autograd.grad(score, (policy.mean.weight, policy.log_std, state[0]), retain_graph=True)
    assert pathwise.abs().sum() > 0
    assert all(grad.abs().sum() > 0 for grad in by_score)


def test_score_gradient_raises_the_probability_of_what_paid_off(policy, state):
    optimizer = torch.optim.SGD(policy.mean.parameters(), lr=0.1)
    action = policy(*state, sample=True)
    u = (action.delta / policy.delta_scale).atanh().detach()
    before = action.log_prob.detach()
    policy.loss(action, torch.ones(B), torch.randn(B, F), torch.randn(B, F)).score.backward()
    optimizer.step()
    mean = policy.mean(policy.trunk(torch.cat(state, 1)))
    after = squashed_log_prob(u, mean, policy.log_std, policy.delta_scale)
    assert (after > before).float().mean() > 0.5 and after.mean() > before.mean()


def test_value_learns_the_reward_and_the_advantage_carries_no_gradient_to_it(policy, state):
    action = policy(*state, sample=True)
    parts = policy.loss(action, torch.ones(B), torch.randn(B, F), torch.randn(B, F))
    assert torch.autograd.grad(parts.score, policy.value.weight, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(parts.value, policy.value.weight)[0].abs().sum() > 0


def test_curiosity_sees_the_real_next_state_and_stops_its_target(policy, state):
    action = policy(*state, sample=True)
    now, later = torch.randn(B, F), torch.randn(B, F)
    same = policy.loss(action, torch.zeros(B), now, now).curiosity
    moved = policy.loss(action, torch.zeros(B), now, later).curiosity
    assert not torch.equal(same, moved)
    # with the target stopped, only the inverse model's error reaches the encoder through the next state
    encoder = policy.curiosity.encode[1].weight
    policy.curiosity.invert.requires_grad_(False)
    grad_same = torch.autograd.grad(moved, encoder)[0]
    assert grad_same.abs().sum() > 0


def test_policy_loss_is_the_weighted_sum_of_its_parts(policy, state):
    parts = policy.loss(policy(*state, sample=True), torch.randn(B), torch.randn(B, F), torch.randn(B, F))
    expected = parts.score + 0.5 * parts.value - 0.01 * parts.entropy + 0.1 * parts.curiosity
    torch.testing.assert_close(parts.loss, expected)


def test_every_parameter_gets_a_gradient(policy, state):
    action = policy(*state, sample=True)
    loss = policy.loss(action, torch.randn(B), torch.randn(B, F), torch.randn(B, F)).loss
    (loss + action.refined.square().sum()).backward()
    assert [n for n, p in policy.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []
