"""The prompt: a task's demonstrations as text through Qwen, and as fifteen numbers through a small network.

    demonstrations ─► prompt_text: rule sentence, rows of digits ─► Qwen ─► pool ─► project ─► text embedding  [B, D]
                  └─► mean features ───────────────────────────────────────────────► MLP ─► control         [B, D]
    prompt = ½ text embedding + ½ control

The prompt is always the embedding; what Qwen reads is its text.

Nothing here can see a query or its answer: `forward` takes demonstration pairs and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qwen_fused.arc.features import FEATURES, normalise
from qwen_fused.arc.tasks import Pair
from qwen_fused.qwen.backbone import load_backbone
from qwen_fused.qwen.causal import causal_without_mask
from qwen_fused.qwen.pooling import POOLINGS, QUERIES, AttentionPooling, text_places
from qwen_fused.qwen.prompt_text import ADDED_TOKENS, EncodedText, PromptText
from qwen_fused.qwen.tiny import seeded

# padded tokens that go through Qwen in one call. Two cores: a batch of 16 takes 0.16 s in groups of 2048 and 0.30 s
# in one piece, as prompts differ in length and activations outgrow the cache. One core, in turns: groups of 1024 take
# 1 / 1.12 of the time of 2048, with 3 % of padding instead of 13 %. A GPU wants more work at once.
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 16384}


@dataclass
class PromptOutput:
    """What `QwenPrompt` makes of a batch of tasks."""

    prompt: Tensor
    """[B, D] float32: half text, half control."""
    text_embedding: Tensor
    """[B, D] float32: Qwen's pooled hidden state, projected and normalised."""
    control: Tensor
    """[B, D] float32: the fifteen features through the control network."""
    features: Tensor
    """[B, 15] float32: mean features of the demonstrations, scaled to O(1); no gradient."""
    truncated: float | Tensor
    """Share of the batch's prompts whose text had no room for all demonstrations."""


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision (of the weights or of autocast) widened; double precision kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split indices into groups of like lengths, longest first, each of at most `budget` cells with its padding."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class QwenPrompt(nn.Module):
    """Turn demonstrations into prompt embeddings, differentiably, through one Qwen backbone.

    What Qwen reads is `prompt_text`, and what it makes of it is half of the prompt; see `qwen_fused.qwen.prompt_text`
    for what happens to a text that is longer than `max_prompt_tokens`.

    Args:
        qwen: "tiny", a folder with a saved Qwen2, Qwen2.5 or Qwen3, or a hub name.
        dim: D, the width of the prompt.
        max_prompt_tokens: the most tokens of one prompt.
        pooling: "mean" over the prompt's tokens, the "last" token's hidden state, or "attention": learned queries and
            the last state, see `qwen_fused.qwen.pooling`. P, the width of what is pooled, is Qwen's width, or with
            attention a multiple of it.
        lora_rank: above 0, only LoRA adapters of this rank are trained in the backbone.
        gradient_checkpointing: recompute activations in the backward pass.
        dtype: of the backbone's weights. Projection and control stay in float32.
        attention: transformers' attention implementation: "sdpa", "eager" or "flash_attention_2".
        seed: of every weight that is drawn here; torch's global generators are not moved.

    Raises:
        ValueError: an argument out of range, or a backbone that cannot be loaded, see `load_backbone`.
    """

    def __init__(
        self,
        qwen: str = "tiny",
        *,
        dim: int = 256,
        max_prompt_tokens: int = 512,
        pooling: str = "mean",
        lora_rank: int = 0,
        gradient_checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.backbone, self.tokenizer = load_backbone(
            qwen,
            lora_rank=lora_rank,
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            attention=attention,
            seed=seed,
            added_tokens=ADDED_TOKENS,
        )
        config = self.backbone.config
        self.prompt_text = PromptText(self.tokenizer, max_prompt_tokens, config.max_position_embeddings)
        self.pooling, width = pooling, config.hidden_size
        self.queries: AttentionPooling | None = None
        if pooling == "attention":
            self.queries, width = AttentionPooling(config.hidden_size, seed=seed + 2), width * (QUERIES + 1)
        with seeded(seed + 1):
            self.projection = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
            self.control = nn.Sequential(
                nn.Linear(len(FEATURES), dim), nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
            )

    def forward(self, demonstrations: Sequence[Sequence[Pair]], pooled: Tensor | None = None) -> PromptOutput:
        """Read each episode's demonstrations; the gradient of the result reaches the backbone.

        Args:
            demonstrations: B episodes of at least one pair each, every pair with its output.
            pooled: [B, P] as `pooled` gives it, where the pass through Qwen is already done (by a
                `PromptWindow`); the gradient then goes there.

        Returns:
            The prompt [B, D], its two halves, the features, and which share of the texts was truncated.

        Raises:
            ValueError: no episode, an episode without demonstrations, a pair without output, or `pooled` of
                another shape.
        """
        texts = self.prompt_text.encode(demonstrations)
        weight = self._first_weight
        shape = (len(texts), weight.shape[1])
        if pooled is None:
            pooled = self._pool_in_groups(texts)
        elif pooled.shape != shape:
            raise ValueError(f"pooled must be {list(shape)}, got {tuple(pooled.shape)}")
        features, truncated = self._describe(texts)
        return self.embed(pooled, features.to(pooled.device, non_blocking=True), truncated)

    def describe(self, demonstrations: Sequence[Sequence[Pair]]) -> tuple[Tensor, float]:
        """What is made of a prompt on the host: features [B, 15] float32, and the share of the texts truncated."""
        return self._describe(self.prompt_text.encode(demonstrations))

    def embed(self, pooled: Tensor, features: Tensor, truncated: float | Tensor) -> PromptOutput:
        """Prompts of what Qwen and `describe` made of the demonstrations; nothing here looks at the host.

        Args:
            pooled: [B, P].
            features: [B, 15] float32, on the same device.
            truncated: handed on.
        """
        dtype = self._first_weight.dtype
        text_embedding = at_least_float32(self.projection(pooled.to(dtype)))
        control = at_least_float32(self.control(features.to(dtype)))
        prompt = 0.5 * text_embedding + 0.5 * control
        return PromptOutput(prompt, text_embedding, control, features, truncated)

    def pooled(self, demonstrations: Sequence[Sequence[Pair]]) -> Tensor:
        """Qwen's pooled hidden states [B, P] of each episode's text, float32: the part that costs a pass.

        As the `encode` of a `PromptWindow`, whose keys are then the demonstrations, as tuples of the same pairs.
        """
        return self._pool_in_groups(self.prompt_text.encode(demonstrations))

    @property
    def _first_weight(self) -> nn.Parameter:
        """The projection's weight, [D, P]: where, and in which dtype, what comes after Qwen computes."""
        return next(self.projection.parameters())

    def _describe(self, texts: Sequence[EncodedText]) -> tuple[Tensor, float]:
        features = torch.from_numpy(normalise(np.stack([text.features for text in texts])))
        return features, sum(text.truncated for text in texts) / len(texts)

    def _pool_in_groups(self, texts: Sequence[EncodedText]) -> Tensor:
        """Pooled hidden states [B, P] of texts, those of like length together."""
        budget = TOKENS_PER_FORWARD.get(self._first_weight.device.type, TOKENS_PER_FORWARD["cuda"])
        groups = group_by_length([len(text.ids) for text in texts], budget)
        pooled = torch.cat([self._pool_group([texts[index] for index in group]) for group in groups])
        # back from the groups' order to the batch's
        order = torch.from_numpy(np.argsort(np.concatenate(groups)))
        return pooled[order.to(pooled.device, non_blocking=True)]

    def _pool_group(self, texts: Sequence[EncodedText]) -> Tensor:
        """Pooled hidden states [b, P] of prompts that go through Qwen together."""
        rows = [text.ids for text in texts]
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        device = self._first_weight.device
        # padding is on the right and attention is causal, so no prompt ever sees a pad: without a mask SDPA takes
        # its causal kernel, which skips half of the work
        mask = causal_without_mask(self.backbone.config, ids.shape[1])
        # transfers wait for nothing: a step on CUDA need not stop for its prompts
        tokens = torch.from_numpy(ids).to(device, non_blocking=True)
        output = self.backbone(input_ids=tokens, attention_mask=mask, use_cache=False)
        hidden = at_least_float32(output.last_hidden_state)
        length = torch.tensor([len(row) for row in rows]).to(device, non_blocking=True)
        valid = torch.arange(hidden.shape[1], device=device) < length[:, None]
        if self.pooling == "mean":
            return (hidden * valid[..., None]).sum(1) / length[:, None]
        last = hidden[torch.arange(len(rows), device=device), length - 1]
        if self.queries is None:
            return last
        place = text_places(texts).to(device, non_blocking=True)
        return torch.cat([self.queries(hidden, place, valid).flatten(1), last], 1)
