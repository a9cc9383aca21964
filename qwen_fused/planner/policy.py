"""The policy: refines the prompt with a gated, bounded, stochastic step, and learns from two gradients at once.

    s = (prompt, control, features),  u ~ N(mu(s), sigma)
    delta = scale * tanh(u),  refined = prompt + alpha(s) * delta

The pathwise gradient comes back through `refined` from the plan's loss. The score-function gradient comes from
`log pi(delta | s) * (reward - V(s))`, with u held fixed and the tanh Jacobian subtracted. A forward-and-inverse
curiosity model (ICM, Pathak et al., 2017) watches what the step did to the plan: the real next state, not the same one.

Log-probabilities and entropies are means over the D dimensions, so that the loss does not grow with D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

REWARD_SCALE = 5.0
# weights inside the policy's loss
VALUE_WEIGHT, ENTROPY_WEIGHT, CURIOSITY_WEIGHT = 0.5, 0.01, 0.1


@dataclass
class Action:
    """What the policy did to B prompts."""

    refined: Tensor  # [B, D]
    delta: Tensor  # [B, D], before the gate
    gate: Tensor  # [B, 1] in (0, 1)
    value: Tensor  # [B], predicted reward
    log_prob: Tensor  # [B], mean over D; gradient to mu and sigma only
    entropy: Tensor  # [B], of the Gaussian, mean over D


@dataclass
class PolicyLoss:
    """The policy's loss and its parts, each a 0-d tensor."""

    loss: Tensor
    score: Tensor
    value: Tensor
    entropy: Tensor
    curiosity: Tensor


class Curiosity(nn.Module):
    """ICM: predict the next plan state from this one and the action, and the action from both states."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        # plan states grow as the agent learns; normalised, the errors stay comparable
        self.encode = nn.Sequential(nn.LayerNorm(state_dim), nn.Linear(state_dim, hidden))
        self.predict = nn.Sequential(nn.Linear(hidden + action_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.invert = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, action_dim))

    def forward(self, state: Tensor, next_state: Tensor, delta: Tensor, delta_scale: float) -> Tensor:
        """Forward error against a stopped target plus inverse error, [B]; state and next_state [B, F], delta [B, D]."""
        now, later = self.encode(state), self.encode(next_state)
        action = (delta / delta_scale).detach()
        forward_error = (self.predict(torch.cat([now, action], 1)) - later.detach()).square().mean(1)
        inverse_error = (self.invert(torch.cat([now, later], 1)) - action).square().mean(1)
        return forward_error + inverse_error


class PromptPolicy(nn.Module):
    """Gaussian policy over prompt refinements, with a gate and a value head.

    Args:
        prompt_dim: prompt width D; the control vector has the same width.
        features: number of demonstration features.
        state_dim: width of the plan state that curiosity watches.
        hidden: trunk width.
        delta_scale: bound on each coordinate of delta.
    """

    def __init__(
        self,
        *,
        prompt_dim: int = 256,
        features: int = 15,
        state_dim: int = 64,
        hidden: int = 512,
        delta_scale: float = 0.2,
    ):
        super().__init__()
        self.delta_scale = delta_scale
        self.trunk = nn.Sequential(nn.Linear(2 * prompt_dim + features, hidden), nn.GELU())
        self.mean = nn.Linear(hidden, prompt_dim)
        self.log_std = nn.Parameter(torch.full((prompt_dim,), math.log(0.3)))
        self.gate = nn.Linear(hidden, 1)
        self.value = nn.Linear(hidden, 1)
        self.curiosity = Curiosity(state_dim, prompt_dim)
        # a small step at first, neither zero (no gradient to learn from) nor saturated
        nn.init.normal_(self.mean.weight, std=0.1 / hidden**0.5)
        nn.init.zeros_(self.mean.bias)
        nn.init.zeros_(self.value.weight)

    def forward(
        self, prompt: Tensor, control: Tensor, features: Tensor, *, sample: bool, noise: Tensor | None = None
    ) -> Action:
        """Refine the prompt: with noise for training (`sample=True`), at the mean for evaluation.

        Args:
            prompt, control: [B, D] float.
            features: [B, features] float.
            noise: [B, D] standard normal; drawn here when left out.
        """
        h = self.trunk(torch.cat([prompt, control, features], 1))
        mean, log_std = self.mean(h).float(), self.log_std.float().clamp(-5.0, 1.0)
        u = mean
        if sample:
            u = mean + log_std.exp() * (torch.randn_like(mean) if noise is None else noise)
        delta = self.delta_scale * u.tanh()
        gate = self.gate(h).sigmoid()
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).mean().expand(prompt.shape[0])
        return Action(
            refined=prompt + gate * delta.to(prompt.dtype),
            delta=delta,
            gate=gate,
            value=self.value(h).squeeze(1).float(),
            log_prob=squashed_log_prob(u.detach(), mean, log_std, self.delta_scale),
            entropy=entropy,
        )

    def loss(self, action: Action, reward: Tensor, state: Tensor, next_state: Tensor) -> PolicyLoss:
        """Policy-gradient, value, entropy and curiosity losses.

        Args:
            action: what `forward` returned with `sample=True`.
            reward: [B], no gradient.
            state, next_state: [B, F], the plan's pooled state under the prompt as it was and as refined.
        """
        reward = reward.detach().float()
        advantage = reward - action.value.detach()
        score = -(advantage * action.log_prob).mean()
        value = F.mse_loss(action.value, reward)
        entropy = action.entropy.mean()
        # states are observations here: curiosity must not pull the agent towards what is easy to predict
        curiosity = self.curiosity(
            state.detach().float(), next_state.detach().float(), action.delta, self.delta_scale
        ).mean()
        loss = score + VALUE_WEIGHT * value - ENTROPY_WEIGHT * entropy + CURIOSITY_WEIGHT * curiosity
        return PolicyLoss(loss, score, value, entropy, curiosity)


def squashed_log_prob(u: Tensor, mean: Tensor, log_std: Tensor, scale: float) -> Tensor:
    """log density of scale * tanh(u) for u ~ N(mean, exp(log_std)), mean over the last dimension.

    log(1 - tanh(u)^2) is written 2 (log 2 - u - softplus(-2u)), which does not underflow (Haarnoja et al., 2018).
    """
    gaussian = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    jacobian = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u)) + math.log(scale)
    return (gaussian - jacobian).mean(-1)
