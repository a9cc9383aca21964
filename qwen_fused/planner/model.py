"""Qwen, policy, agent and objective as one module: a training step's loss, and predictions for unseen queries.

The gradient path is prompt -> policy -> plan -> loss, unbroken. Two things are observations on purpose and carry no
gradient: the baseline plan under the unrefined prompt (it is only argmaxed, for the reward) and the reward itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from qwen_fused.arc.episodes import MAX_SIDE, Batch, Episode, collate
from qwen_fused.arc.features import FEATURES, SIZE_FEATURES
from qwen_fused.arc.symmetry import SYMMETRIES, swaps_sides, turn_back
from qwen_fused.config import TrainConfig
from qwen_fused.planner.attempts import further_attempts
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.planner.make_agent import make_agent
from qwen_fused.planner.objective import PlanObjective, PlanScore
from qwen_fused.planner.policy import REWARD_SCALE, Action, PolicyLoss, PromptPolicy
from qwen_fused.qwen.prompt import PromptOutput, QwenPrompt


@dataclass
class StepOutput:
    """One training step's loss and what is logged of it."""

    loss: Tensor  # 0-d
    score: PlanScore
    policy: PolicyLoss
    action: Action
    reward: Tensor  # [B]
    prompt: Tensor  # [B, D], as it left Qwen's side
    truncated: float | Tensor  # share of the prompts whose text had no room for all demonstrations


class QwenPlanner(nn.Module):
    """Everything that trains: one Qwen backbone, the policy, the agent and the objective's parameters."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = config
        self.prompt = QwenPrompt(
            config.qwen,
            dim=config.prompt_dim,
            max_prompt_tokens=config.prompt_tokens,
            pooling=config.pooling,
            lora_rank=config.lora_rank,
            gradient_checkpointing=config.gradient_checkpointing,
            dtype=getattr(torch, config.qwen_dtype),
            attention=config.attention,
            seed=config.seed,
        )
        self.policy = PromptPolicy(
            prompt_dim=config.prompt_dim,
            features=len(FEATURES),
            state_dim=config.agent_channels,
            hidden=config.policy_hidden,
            delta_scale=config.delta_scale,
        )
        self.agent = make_agent(config)
        self.objective = PlanObjective(
            prompt_dim=config.prompt_dim,
            weights=config.weights,
            steps=config.plan_steps,
            early_step_weight=config.early_step_weight,
            reversibility=config.reversibility,
            hard_floor=config.hard_floor,
            hard_mode=config.hard_mode,
            size_warmup=config.size_warmup,
            size_weight=config.size_weight,
            backend=config.backend,
        )

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by group, each once, with their names in the whole model."""
        members: dict[str, list[nn.Module]] = {
            # the queries stand behind Qwen and before the window: they stand still inside it, as Qwen does
            "qwen": [self.prompt.backbone, *([self.prompt.queries] if self.prompt.queries else [])],
            "agent": [self.agent, self.prompt.projection, self.prompt.control],
            "policy": [self.policy],
            "objective": [self.objective],
        }
        owner = {id(p): name for name, modules in members.items() for m in modules for p in m.parameters()}
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in members}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[owner[id(parameter)]].append((name, parameter))
        return groups

    def forward(
        self, batch: Batch, *, epoch: int, pooled: Tensor | None = None, noise: Tensor | None = None
    ) -> StepOutput:
        """Loss of one batch of training episodes; `loss.backward()` reaches every trainable parameter.

        Args:
            batch: episodes with answers.
            epoch: for the curriculum.
            pooled: [B, P] Qwen's pooled states where a `PromptWindow` has made them; the gradient ends there.
            noise: [B, D] the policy's noise; drawn when left out.
        """
        encoded = self.prompt([e.demonstrations for e in batch.episodes], pooled)
        return self.score(encoded, batch, self.objective.shares(epoch), noise)

    def score(
        self, encoded: PromptOutput, batch: Batch, shares: Sequence[float | Tensor], noise: Tensor | None = None
    ) -> StepOutput:
        """`forward` from the prompt on: of nothing but tensors, and without a look at their values on the host.

        Args:
            encoded: the batch's prompts.
            batch: its tensors; episodes are not looked at.
            shares: of the plan's loss and the size loss in the objective.
            noise: [B, D] the policy's noise; drawn when left out.
        """
        action = self.policy(encoded.prompt, encoded.control, encoded.features, sample=True, noise=noise)
        plan = self.agent(action.refined, batch.query, batch.query_size, batch.target_size, target=batch.target)
        size_logits = self.size_logits(action.refined, batch.query_size, encoded.features)
        score = self.objective(
            plan, size_logits, action.refined, batch.query, batch.target, batch.target_size, shares=shares
        )
        accuracy_before, state_before = self.baseline(encoded.prompt, batch)
        reward = REWARD_SCALE * (score.efe.accuracy - accuracy_before)
        policy = self.policy.loss(action, reward, state_before, plan.state)
        share = self.config.objective_share
        loss = share * score.loss + (1 - share) * policy.loss
        return StepOutput(loss, score, policy, action, reward, encoded.prompt, encoded.truncated)

    @torch.no_grad()
    def baseline(self, prompt: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Accuracy [B] and plan state [B, F] under the prompt as it was; only argmaxed, so without a graph."""
        plan = self.agent(prompt, batch.query, batch.query_size, batch.target_size, readouts=1)
        valid = batch.target >= 0
        right = (plan.logits[:, -1].argmax(1) == batch.target) & valid
        return right.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1), plan.state

    def size_logits(self, prompt: Tensor, query_size: Tensor, features: Tensor) -> Tensor:
        """Logits [B, 2, S] over the answer's rows and columns."""
        # the prompt's features hold sides per thirty cells
        # one column at a time: a list as an index would be copied to the device, and the step would wait for it
        sides = MAX_SIDE * torch.stack([features[:, FEATURES.index(name)] for name in SIZE_FEATURES], 1)
        return self.agent.size_head(prompt, query_size, sides)

    def predict(self, episodes: Sequence[Episode], attempts: int = 2) -> list[list[np.ndarray]]:
        """Predict answers: the size first, then the cells; the second attempt is a vote over the dihedral views.

        Args:
            episodes: demonstrations and query; the answer is never looked at.
            attempts: grids per episode, different from each other.

        Returns:
            Per episode a list of `attempts` uint8 grids [h, w], best first.
        """
        upright = [e.without_answer() for e in episodes]
        with evaluating(self):
            encoded = self.refined_prompt(upright)
            size, rival = self.likely_sizes(upright, encoded)
            first = self.cell_probabilities(upright, encoded, size)
            predictions = [[p.argmax(0).astype(np.uint8)] for p in first]
            if attempts > 1:
                vote = self.voted_probabilities(upright, rival)
                for grids, probability, voted in zip(predictions, first, vote, strict=True):
                    grids += further_attempts(probability, voted.argmax(0).astype(np.uint8), attempts - 1)
        return predictions

    def refined_prompt(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Prompts [B, D] after the policy's mean step, and the features [B, 15]."""
        encoded = self.prompt([e.demonstrations for e in episodes])
        action = self.policy(encoded.prompt, encoded.control, encoded.features, sample=False)
        return action.refined, encoded.features

    def likely_sizes(
        self, episodes: Sequence[Episode], encoded: tuple[Tensor, Tensor]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The likeliest size of each answer; and the runner-up where it is a real rival, else the likeliest again."""
        prompt, features = encoded
        query_size = torch.tensor([e.query.shape for e in episodes], device=prompt.device)
        log_p = self.size_logits(prompt, query_size, features).float().log_softmax(2)
        side = log_p.shape[2]
        value, index = (log_p[:, 0, :, None] + log_p[:, 1, None, :]).flatten(1).topk(2)
        # from 4 to 1 against, a second size is not worth the second attempt
        index[:, 1] = torch.where(value[:, 0] - value[:, 1] < math.log(4), index[:, 1], index[:, 0])
        best, other = ([(i // side + 1, i % side + 1) for i in column] for column in index.T.tolist())
        return best, other

    def cell_probabilities(
        self, episodes: Sequence[Episode], encoded: tuple[Tensor, Tensor], sizes: list[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Colour probabilities [C, h, w] of each answer at the given sizes."""
        logits = self.plan_at(episodes, encoded[0], sizes, readouts=1)[:, -1]
        probability = logits.float().softmax(1).cpu().numpy()
        return [p[:, :h, :w] for p, (h, w) in zip(probability, sizes, strict=True)]

    def voted_probabilities(self, episodes: Sequence[Episode], sizes: list[tuple[int, int]]) -> list[np.ndarray]:
        """Mean of the colour probabilities over the eight dihedral views of the whole episode."""
        total: list[np.ndarray] = [np.zeros(())] * len(sizes)
        for symmetry in range(SYMMETRIES):
            turned = [e.turn(symmetry) for e in episodes]
            seen = [(w, h) if swaps_sides(symmetry) else (h, w) for h, w in sizes]
            for b, p in enumerate(self.cell_probabilities(turned, self.refined_prompt(turned), seen)):
                total[b] = total[b] + turn_back(p, symmetry) / SYMMETRIES
        return total

    def plan_at(
        self, episodes: Sequence[Episode], prompt: Tensor, sizes: list[tuple[int, int]], readouts: int | None = None
    ) -> Tensor:
        """Plan logits [B, T, C, H, W] for answers of the given sizes, on a canvas that holds queries and answers."""
        canvas = tuple(max(*(s[k] for s in sizes), *(e.query.shape[k] for e in episodes)) for k in (0, 1))
        batch = collate(list(episodes), canvas=canvas).to(prompt.device)
        size = torch.tensor(sizes, device=prompt.device)
        return self.agent(prompt, batch.query, batch.query_size, size, readouts=readouts).logits

    def plan_steps(self, episode: Episode) -> list[np.ndarray]:
        """The grid that each planning step would answer, first to last, at the predicted size."""
        with evaluating(self):
            upright = [episode.without_answer()]
            encoded = self.refined_prompt(upright)
            sizes, _ = self.likely_sizes(upright, encoded)
            (h, w), logits = sizes[0], self.plan_at(upright, encoded[0], sizes)
        return list(logits[0].argmax(1)[:, :h, :w].cpu().numpy().astype(np.uint8))

    def backward_steps(self, episode: Episode) -> list[np.ndarray]:
        """What the backward plan makes of a known answer: the query, then its grid beside each planning step.

        The prompt is from the demonstrations alone, as ever; nothing here is a prediction.
        """
        with evaluating(self):
            batch = collate([episode]).to(self.agent.copy_scale.device)
            prompt, _ = self.refined_prompt([episode.without_answer()])
            plan = self.agent(prompt, batch.query, batch.query_size, batch.target_size, target=batch.target)
        (rows, columns), (h, w) = episode.query.shape, batch.target_size[0].tolist()
        query = plan.back_input[0, :, :rows, :columns]
        steps = plan.back_logits[0, :, :, :h, :w]
        return [grid.cpu().numpy().astype(np.uint8) for grid in (query.argmax(0), *steps.argmax(1))]
