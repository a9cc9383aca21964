"""What a plan is scored by: the EFE loss with its learned preference and anchor, reversibility, and the size loss.

    objective = (1 - w) * (EFE + lambda_rev * reversibility) + w * size,  w = 0.6 in epoch 0, then 0.3

The preference table, its prompt-conditioned scale and the anchor exist from construction on, so that the optimizer
and the checkpoint hold them. The anchor is an exponential moving average of the outcomes of solved episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qwen_fused.arc.episodes import COLORS, MAX_SIDE
from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEOutput, EFEWeights, efe_loss
from qwen_fused.planner.agent import Plan


@dataclass
class PlanScore:
    """The objective of one batch and its parts; 0-d tensors except for `efe`."""

    loss: Tensor
    efe: EFEOutput
    reversibility: Tensor
    size: Tensor
    size_accuracy: Tensor  # share of episodes with both sides right, no gradient


class PlanObjective(nn.Module):
    """EFE, reversibility and size losses of a plan.

    Args:
        prompt_dim: prompt width D.
        weights: weights of the EFE terms.
        steps: planning steps T.
        early_step_weight: cross-entropy weight of every step but the last, which has 1.
        reversibility: weight of the cross-entropy of the query reconstructed by the backward plan.
        hard_floor, hard_mode: the hard-cell weighting of `qwen_fused.efe_loss`.
        size_warmup, size_weight: share of the size loss in epoch 0 and after.
        backend: backend of `qwen_fused.efe_loss`.
    """

    step_weight: Tensor  # [T]
    anchor: Tensor  # [C, H, W]

    def __init__(
        self,
        *,
        prompt_dim: int = 256,
        weights: EFEWeights | None = None,
        steps: int = 5,
        early_step_weight: float = 0.1,
        reversibility: float = 0.4,
        hard_floor: float = 0.5,
        hard_mode: str = "episode",
        size_warmup: float = 0.6,
        size_weight: float = 0.3,
        backend: str = "auto",
    ):
        super().__init__()
        self.weights = weights or EFEWeights()
        self.reversibility, self.backend = reversibility, backend
        self.hard_floor, self.hard_mode = hard_floor, hard_mode
        self.size_warmup, self.size_weight = size_warmup, size_weight
        step_weight = torch.full((steps,), early_step_weight)
        step_weight[-1] = 1.0
        self.register_buffer("step_weight", step_weight, persistent=False)
        self.has_preference = self.weights.risk != 0 or self.weights.anchor != 0
        if self.has_preference:
            self.preference = nn.Parameter(0.01 * torch.randn(MAX_SIDE, MAX_SIDE, COLORS))
            self.preference_scale = nn.Linear(prompt_dim, COLORS)
        if self.weights.ambiguity != 0:
            # rows are states, columns observations: mostly the state's own colour, as a sensor should be
            self.observation = nn.Parameter(4.0 * torch.eye(COLORS))
        if self.weights.prompt != 0:
            self.prompt_colors = nn.Linear(prompt_dim, COLORS)
        self.register_buffer("anchor", torch.full((COLORS, MAX_SIDE, MAX_SIDE), 1.0 / COLORS))

    def size_share(self, epoch: int) -> float:
        """Weight w of the size loss in an epoch; a share, since a common factor is invisible to Adam."""
        return self.size_warmup if epoch == 0 else self.size_weight

    def shares(self, epoch: int) -> tuple[float, float]:
        """What the plan's loss and the size loss have of the objective in an epoch."""
        return 1 - self.size_share(epoch), self.size_share(epoch)

    def preference_logits(self, prompt: Tensor, height: int, width: int) -> Tensor:
        """Learned preference c over colours per cell, scaled per colour by the prompt: [B, C, H, W]."""
        table = self.preference[:height, :width].permute(2, 0, 1)  # [C, H, W]
        return table * (1 + self.preference_scale(prompt))[..., None, None]

    def forward(
        self,
        plan: Plan,
        size_logits: Tensor,
        prompt: Tensor,
        query: Tensor,
        target: Tensor,
        size: Tensor,
        epoch: int | None = None,
        shares: Sequence[float | Tensor] = (),
    ) -> PlanScore:
        """Score a plan.

        Args:
            plan: forward plan and, where it was made, the backward one.
            size_logits: [B, 2, S] logits of (height, width) - 1.
            prompt: [B, D], the refined prompt.
            query, target: [B, H, W] int64, -100 where there is no cell.
            size: [B, 2] int64, rows and columns of the answer.
            epoch: for the curriculum.
            shares: in its place, what `shares` gives for it, as 0-d tensors where a step is recorded.
        """
        height, width = target.shape[1:]
        efe = efe_loss(
            plan.logits,
            target,
            back_logits=plan.back_logits if self.weights.agreement else None,
            preference_logits=self.preference_logits(prompt, height, width) if self.has_preference else None,
            anchor_log_probs=self.anchor[:, :height, :width].log() if self.weights.anchor else None,
            obs_entropy=self.observation_entropy() if self.weights.ambiguity else None,
            prompt_colors=self.prompt_colors(prompt) if self.weights.prompt else None,
            step_weight=self.step_weight,
            weights=self.weights,
            hard_floor=self.hard_floor,
            hard_mode=self.hard_mode,
            backend=self.backend,
        )
        # without a backward plan there is nothing to reverse
        reversibility = efe.loss.new_zeros(())
        if plan.back_input is not None:
            reversibility = hard_cell_cross_entropy(plan.back_input, query, hard_mode="none", backend=self.backend).loss
        size_loss = 2 * F.cross_entropy(size_logits.float().flatten(0, 1), (size - 1).flatten())
        plan_share, size_share = shares if epoch is None else self.shares(epoch)
        loss = plan_share * (efe.loss + self.reversibility * reversibility) + size_share * size_loss
        right = (size_logits.argmax(2) == size - 1).all(1).float().mean()
        return PlanScore(loss, efe, reversibility.detach(), size_loss.detach(), right)

    def observation_entropy(self) -> Tensor:
        """Entropy [C] of P(o|s) for each state s."""
        log_p = self.observation.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)

    @torch.no_grad()
    def update_anchor(self, target: Tensor, solved: Tensor) -> None:
        """Move the anchor towards the outcomes of the solved episodes, at rate 0.05 + 0.15 * share solved.

        Cells that no solved grid covers stay where they are. Runs without a host sync.
        """
        height, width = target.shape[1:]
        valid = ((target >= 0) & solved.view(-1, 1, 1)).float()  # [B, H, W]
        outcome = F.one_hot(target.clamp(min=0), self.anchor.shape[0]).permute(0, 3, 1, 2) * valid.unsqueeze(1)
        count = valid.sum(0)
        rate = (0.05 + 0.15 * solved.float().mean()) * (count > 0)
        mean = outcome.sum(0) / count.clamp(min=1)
        region = self.anchor[:, :height, :width]
        region.lerp_(mean.to(region.dtype), rate.to(region.dtype))
        # a colour never seen must keep a finite log
        region.clamp_(min=1e-4)
        region.div_(region.sum(0, keepdim=True))
