"""Qwen, policy, agent and objective as one module: a training step's loss, and predictions for unseen queries.

The gradient path is prompt -> policy -> plan -> loss, unbroken. Two things are observations on purpose and carry no
gradient: the baseline plan under the unrefined prompt (it is only argmaxed, for the reward) and the reward itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from qwen_fused.agent import GridAgent
from qwen_fused.config import TrainConfig
from qwen_fused.data import MAX_SIDE, Batch, Episode, collate
from qwen_fused.features import FEATURES
from qwen_fused.objective import PlanObjective, Score
from qwen_fused.policy import REWARD_SCALE, Action, PolicyLoss, PromptPolicy
from qwen_fused.prompt import QwenPrompt
from qwen_fused.symmetry import SYMMETRIES, swaps_sides, turn_back, turn_episode

SIZE_FEATURES = ("height_in", "width_in", "height_out", "width_out")


@dataclass
class StepOutput:
    """One training step's loss and what is logged of it."""

    loss: Tensor  # 0-d
    score: Score
    policy: PolicyLoss
    action: Action
    reward: Tensor  # [B]
    prompt: Tensor  # [B, D], as it left Qwen's side


class QwenPlanner(nn.Module):
    """Everything that trains: one Qwen backbone, the policy, the agent and the objective's parameters."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = config
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.qwen_dtype]
        self.prompt = QwenPrompt(
            config.qwen,
            dim=config.prompt_dim,
            max_prompt_tokens=config.max_prompt_tokens,
            pooling=config.pooling,
            lora_rank=config.lora_rank,
            gradient_checkpointing=config.gradient_checkpointing,
            dtype=dtype,
            seed=config.seed,
        )
        self.policy = PromptPolicy(
            prompt_dim=config.prompt_dim,
            features=len(FEATURES),
            state_dim=config.agent_channels,
            hidden=config.policy_hidden,
            delta_scale=config.delta_scale,
        )
        self.agent = GridAgent(
            channels=config.agent_channels, prompt_dim=config.prompt_dim, steps=config.plan_steps
        )
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
        members = {
            "qwen": [self.prompt.backbone],
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

    def forward(self, batch: Batch, *, epoch: int) -> StepOutput:
        """Loss of one batch of training episodes; `loss.backward()` reaches every trainable parameter."""
        encoded = self.prompt([e.demonstrations for e in batch.episodes])
        action = self.policy(encoded.prompt, encoded.control, encoded.features, sample=True)
        plan = self.agent(
            action.refined, batch.query, batch.query_size, batch.target_size, target=batch.target
        )
        size_logits = self.size_logits(action.refined, batch.query_size, encoded.features)
        score = self.objective(
            plan, size_logits, action.refined, batch.query, batch.target, batch.target_size, epoch
        )
        with torch.no_grad():
            before = self.agent(
                encoded.prompt, batch.query, batch.query_size, batch.target_size, readouts=1
            )
            valid = batch.target >= 0
            right = (before.logits[:, -1].argmax(1) == batch.target) & valid
            accuracy_before = right.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
            reward = REWARD_SCALE * (score.efe.accuracy - accuracy_before)
        policy = self.policy.loss(action, reward, before.state, plan.state)
        share = self.config.objective_share
        loss = share * score.loss + (1 - share) * policy.loss
        return StepOutput(loss, score, policy, action, reward, encoded.prompt)

    def size_logits(self, prompt: Tensor, query_size: Tensor, features: Tensor) -> Tensor:
        """Logits [B, 2, S] over the answer's rows and columns."""
        # the prompt's features hold sides per thirty cells
        sides = MAX_SIDE * features[:, [FEATURES.index(name) for name in SIZE_FEATURES]]
        return self.agent.size_head(prompt, query_size, sides)

    @torch.no_grad()
    def predict(
        self, episodes: Sequence[Episode], attempts: int = 2, *, views: int = SYMMETRIES
    ) -> list[list[np.ndarray]]:
        """Predict answers: size first, then cells, by a vote over dihedral views of the whole episode.

        Args:
            episodes: demonstrations and query; the answer is never looked at.
            attempts: grids per episode, different from each other where possible.
            views: how many of the 8 dihedral views vote; the first is the episode as it is.

        Returns:
            Per episode a list of `attempts` uint8 grids [h, w], best first.
        """
        episodes = [e.without_answer() for e in episodes]
        with evaluating(self):
            turned = [[turn_episode(e, v) for e in episodes] for v in range(views)]
            encoded = [self.refined_prompt(view) for view in turned]
            sizes, alternative = self.vote_size(turned, encoded)
            voted = self.vote_cells(turned, encoded, sizes)
            predictions = [[p.argmax(0).astype(np.uint8)] for p in voted]
            if attempts > 1:
                second = self.vote_cells(turned[:1], encoded[:1], alternative)
                for grids, probabilities, other in zip(predictions, voted, second, strict=True):
                    grids += further_attempts(probabilities, other.argmax(0).astype(np.uint8), attempts - 1)
        return predictions

    def refined_prompt(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Prompts [B, D] after the policy's mean step, and the features [B, 15]."""
        encoded = self.prompt([e.demonstrations for e in episodes])
        action = self.policy(encoded.prompt, encoded.control, encoded.features, sample=False)
        return action.refined, encoded.features

    def vote_size(
        self, turned: list[list[Episode]], encoded: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The likeliest size of each answer over all views, and the runner-up where it is a real rival."""
        device = encoded[0][0].device
        total = 0.0
        for view, (episodes, (prompt, features)) in enumerate(zip(turned, encoded, strict=True)):
            query_size = torch.tensor([e.query.shape for e in episodes], device=device)
            log_p = self.size_logits(prompt, query_size, features).float().log_softmax(2)
            total = total + (log_p.flip(1) if swaps_sides(view) else log_p) / len(turned)
        joint = (total[:, 0, :, None] + total[:, 1, None, :]).flatten(1)  # [B, S * S]
        side = total.shape[2]
        value, index = joint.topk(2)
        # 4 to 1 against is where a second size stops being worth the second attempt
        index[:, 1] = torch.where(value[:, 0] - value[:, 1] < 1.4, index[:, 1], index[:, 0])
        best, other = index.cpu().unbind(1)
        return [(int(i) // side + 1, int(i) % side + 1) for i in best], [
            (int(i) // side + 1, int(i) % side + 1) for i in other
        ]

    def vote_cells(
        self, turned: list[list[Episode]], encoded: list[tuple[Tensor, Tensor]], sizes: list[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Mean colour probabilities [C, h, w] of each answer at the given sizes, over the views."""
        total: list[np.ndarray] = [np.zeros(())] * len(sizes)
        for view, (episodes, (prompt, _)) in enumerate(zip(turned, encoded, strict=True)):
            seen = [s[::-1] if swaps_sides(view) else s for s in sizes]
            plan = self.plan_at(episodes, prompt, seen, readouts=1)
            probability = plan[:, -1].float().softmax(1).cpu().numpy()
            for b, (h, w) in enumerate(seen):
                total[b] = total[b] + turn_back(probability[b, :, :h, :w], view) / len(turned)
        return total

    def plan_at(
        self, episodes: Sequence[Episode], prompt: Tensor, sizes: list[tuple[int, int]], readouts: int | None = None
    ) -> Tensor:
        """Plan logits [B, T, C, H, W] for answers of the given sizes, on a canvas that holds queries and answers."""
        canvas = tuple(max(*(s[k] for s in sizes), *(e.query.shape[k] for e in episodes)) for k in (0, 1))
        batch = collate(list(episodes), canvas=canvas).to(prompt.device)
        size = torch.tensor(sizes, device=prompt.device)
        return self.agent(prompt, batch.query, batch.query_size, size, readouts=readouts).logits

    @torch.no_grad()
    def plan_steps(self, episode: Episode) -> list[np.ndarray]:
        """The grid that each planning step would answer, first to last, at the predicted size."""
        with evaluating(self):
            turned = [[episode.without_answer()]]
            encoded = [self.refined_prompt(turned[0])]
            sizes, _ = self.vote_size(turned, encoded)
            (h, w), logits = sizes[0], self.plan_at(turned[0], encoded[0][0], sizes)
        return list(logits[0].argmax(1)[:, :h, :w].cpu().numpy().astype(np.uint8))


def further_attempts(probabilities: np.ndarray, other: np.ndarray, count: int) -> list[np.ndarray]:
    """Attempts after the first: another grid where there is one, then the first with a least certain cell changed."""
    ranked = probabilities.argsort(0)[::-1]
    first, runner_up = ranked[0].astype(np.uint8), ranked[1].astype(np.uint8)
    grids = [] if np.array_equal(other, first) else [other]
    ordered = np.sort(probabilities, 0)
    doubt = (ordered[-1] - ordered[-2]).ravel().argsort()
    for cell in doubt[: max(count - len(grids), 0)]:
        grid = first.copy()
        grid.flat[cell] = runner_up.flat[cell]
        grids.append(grid)
    return (grids + [first] * count)[:count]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule's own mode comes back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
