"""The prompt: a task's demonstrations as text through Qwen, and as fifteen numbers through a small network.

    demonstrations ─► rule sentence + grids as rows of digits ─► Qwen ─► pool ─► project ─► text     [B, D]
                  └─► mean features ───────────────────────────────────► MLP ─► control  [B, D]
    prompt = ½ text + ½ control

Nothing here can see a query or its answer: `forward` takes demonstration pairs and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qwen_fused.arc.features import FEATURES, RULES, normalise, pair_features, rule_sentence
from qwen_fused.qwen.backbone import load_backbone
from qwen_fused.qwen.tiny import seeded

if TYPE_CHECKING:
    from qwen_fused.arc.episodes import Pair

INPUT, OUTPUT = "in:\n", "out:\n"
# texts that are one token each where the vocabulary is ours
WHOLE = (*RULES.values(), INPUT, OUTPUT)
POOLINGS = ("mean", "last")

# padded tokens that go through Qwen in one call. Two cores: a batch of 16 takes 0.16 s in groups of 2048 and 0.30 s
# in one piece, as prompts differ in length and activations outgrow the cache. One core, in turns: groups of 1024 take
# 1 / 1.12 of the time of 2048, with 3 % of padding instead of 13 %. A GPU wants more work at once.
GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass
class PromptOutput:
    """What `QwenPrompt` makes of a batch of tasks."""

    prompt: Tensor
    """[B, D] float32: half text, half control."""
    text: Tensor
    """[B, D] float32: Qwen's pooled hidden state, projected and normalised."""
    control: Tensor
    """[B, D] float32: the fifteen features through the control network."""
    features: Tensor
    """[B, 15] float32: mean features of the demonstrations, scaled to O(1); no gradient."""
    dropped_pairs: int
    """Demonstration pairs of this batch left out of the text for want of room."""
    cut_pairs: int
    """Pairs shown in part: an episode's first, where it alone is longer than the room."""
    tokens: int
    """Tokens that Qwen read, padding not counted."""


@dataclass(frozen=True)
class EncodedPair:
    """A demonstration pair as `QwenPrompt` keeps it: made once per distinct text."""

    input_ids: np.ndarray  # [n] int64
    output_ids: np.ndarray  # [m] int64
    features: np.ndarray  # [15] float32

    def ids(self, room: int) -> list[np.ndarray]:
        """The ids of both grids; cut to `room`, each in proportion, so that something of both is seen."""
        total = len(self.input_ids) + len(self.output_ids)
        if total <= room:
            return [self.input_ids, self.output_ids]
        share = min(max(room * len(self.input_ids) // total, 1), room - 1)
        return [self.input_ids[:share], self.output_ids[: room - share]]


def grid_text(grid: np.ndarray) -> str:
    """A grid as one digit per cell and one newline per row: "077\\n700\\n"."""
    rows = np.full((grid.shape[0], grid.shape[1] + 1), ord("\n"), dtype=np.uint8)
    rows[:, :-1] = grid + ord("0")
    return rows.tobytes().decode("ascii")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision (of the weights or of autocast) widened; double precision kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_features(pairs: Sequence[EncodedPair]) -> np.ndarray:
    return np.stack([pair.features for pair in pairs]).mean(0, dtype=np.float32)


def similar_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
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

    The text is the rule sentence and then every pair as `in:` and `out:` with rows of digits: with Qwen's
    tokenizer and with the byte-level one, a cell is one token. Whole pairs are dropped from the end where the text
    would be longer than `max_prompt_tokens`; a first pair that alone is too long keeps the top of its input and
    the top of its output.

    Args:
        qwen: "tiny", a folder with a saved Qwen2, Qwen2.5 or Qwen3, or a hub name.
        dim: D, the width of the prompt.
        max_prompt_tokens: the most tokens of one prompt.
        pooling: "mean" over the prompt's tokens, or the "last" token's hidden state.
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
            whole=WHOLE,
        )
        config = self.backbone.config
        self.rule_ids = {sentence: self._tokenise([sentence + "\n"])[0] for sentence in RULES.values()}
        longest_rule = max(map(len, self.rule_ids.values()))
        if not longest_rule + 2 <= max_prompt_tokens <= config.max_position_embeddings:
            raise ValueError(
                f"max_prompt_tokens must be from {longest_rule + 2} (a rule and something of a pair) to "
                f"{config.max_position_embeddings} (this Qwen's positions), got {max_prompt_tokens}"
            )
        self.max_prompt_tokens, self.pooling = max_prompt_tokens, pooling
        with seeded(seed + 1):
            self.projection = nn.Sequential(nn.Linear(config.hidden_size, dim), nn.LayerNorm(dim))
            self.control = nn.Sequential(
                nn.Linear(len(FEATURES), dim), nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
            )
        self._cache: OrderedDict[str, EncodedPair] = OrderedDict()
        self.cache_size = 8192

    def forward(self, demonstrations: Sequence[Sequence[Pair]], pooled: Tensor | None = None) -> PromptOutput:
        """Read each episode's demonstrations; the gradient of the result reaches the backbone.

        Args:
            demonstrations: B episodes of at least one pair each, every pair with its output.
            pooled: [B, hidden] as `pooled` gives it, where the pass through Qwen is already done (by a
                `PromptWindow`); the gradient then goes there.

        Returns:
            The prompt [B, D], its two halves, the features, and what did not fit.

        Raises:
            ValueError: no episode, an episode without demonstrations, a pair without output, or `pooled` of
                another shape.
        """
        encoded = self._encode(demonstrations)
        rows, dropped, cut = zip(*map(self._ids, encoded), strict=True)
        weight = self._first_weight
        shape = (len(rows), weight.shape[1])
        if pooled is None:
            pooled = self._read(rows)
        elif pooled.shape != shape:
            raise ValueError(f"pooled must be {list(shape)}, got {tuple(pooled.shape)}")
        means = [_mean_features(pairs) for pairs in encoded]
        features = torch.from_numpy(normalise(np.stack(means))).to(pooled.device, non_blocking=True)
        text = at_least_float32(self.projection(pooled.to(weight.dtype)))
        control = at_least_float32(self.control(features.to(weight.dtype)))
        return PromptOutput(
            prompt=0.5 * text + 0.5 * control,
            text=text,
            control=control,
            features=features,
            dropped_pairs=sum(dropped),
            cut_pairs=sum(cut),
            tokens=sum(map(len, rows)),
        )

    def pooled(self, demonstrations: Sequence[Sequence[Pair]]) -> Tensor:
        """Qwen's pooled hidden state [B, hidden] of each episode's text, float32: the part that costs a pass.

        As the `encode` of a `PromptWindow`, whose keys are then the demonstrations, as tuples of the same pairs.
        """
        return self._read([self._ids(pairs)[0] for pairs in self._encode(demonstrations)])

    @property
    def _first_weight(self) -> nn.Parameter:
        """The projection's weight, [D, hidden]: where, and in which dtype, what comes after Qwen computes."""
        return next(self.projection.parameters())

    def _tokenise(self, texts: list[str]) -> list[np.ndarray]:
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [np.asarray(ids, dtype=np.int64) for ids in batch["input_ids"]]

    def _encode(self, demonstrations: Sequence[Sequence[Pair]]) -> list[list[EncodedPair]]:
        """Every pair from the cache, the new ones tokenised in one call."""
        if len(demonstrations) == 0:
            raise ValueError("demonstrations must hold at least one episode, got none")
        keys: list[list[str]] = []
        new: dict[str, tuple[str, str, np.ndarray]] = {}
        for index, pairs in enumerate(demonstrations):
            if len(pairs) == 0:
                raise ValueError(f"demonstrations must hold at least one pair each, got none for episode {index}")
            keys.append([])
            for pair in pairs:
                if pair.output is None:
                    raise ValueError(f"demonstrations must have output grids, got a pair without in episode {index}")
                texts = INPUT + grid_text(pair.input), OUTPUT + grid_text(pair.output)
                key = "".join(texts)
                keys[-1].append(key)
                if key not in self._cache and key not in new:
                    new[key] = (*texts, pair_features(pair.input, pair.output))
        if new:
            ids = self._tokenise([text for first, second, _ in new.values() for text in (first, second)])
            for number, (key, (_, _, features)) in enumerate(new.items()):
                self._cache[key] = EncodedPair(ids[2 * number], ids[2 * number + 1], features)
        encoded = [[self._cache[key] for key in episode] for episode in keys]
        for episode in keys:
            for key in episode:
                self._cache.move_to_end(key)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return encoded

    def _ids(self, pairs: list[EncodedPair]) -> tuple[np.ndarray, int, bool]:
        """Token ids of one episode, how many pairs were dropped, and whether the first one was cut."""
        pieces = [self.rule_ids[rule_sentence(_mean_features(pairs))]]
        room = self.max_prompt_tokens - len(pieces[0])
        for shown, pair in enumerate(pairs):
            length = len(pair.input_ids) + len(pair.output_ids)
            if shown > 0 and length > room:
                return np.concatenate(pieces), len(pairs) - shown, room < 0
            pieces += pair.ids(room)
            room -= length
        return np.concatenate(pieces), 0, room < 0

    def _read(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Pooled hidden states [B, hidden] of token rows, prompts of like length together."""
        budget = GROUP_TOKENS.get(self._first_weight.device.type, GROUP_TOKENS["cuda"])
        groups = similar_lengths([len(row) for row in rows], budget)
        pooled = torch.cat([self._pool([rows[index] for index in group]) for group in groups])
        # back from the groups' order to the batch's
        order = torch.from_numpy(np.argsort(np.concatenate(groups)))
        return pooled[order.to(pooled.device, non_blocking=True)]

    def _pool(self, rows: list[np.ndarray]) -> Tensor:
        """Pooled hidden states [b, hidden] of prompts that go through Qwen together."""
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        device = self._first_weight.device
        # padding is on the right and attention is causal, so no prompt ever sees a pad: without a mask SDPA takes
        # its causal kernel, which skips half of the work
        # transfers wait for nothing: a step on CUDA need not stop for its prompts
        tokens = torch.from_numpy(ids).to(device, non_blocking=True)
        hidden = at_least_float32(self.backbone(input_ids=tokens, use_cache=False).last_hidden_state)
        length = torch.tensor([len(row) for row in rows]).to(device, non_blocking=True)
        if self.pooling == "last":
            return hidden[torch.arange(len(rows), device=device), length - 1]
        valid = torch.arange(hidden.shape[1], device=device) < length[:, None]
        return (hidden * valid[..., None]).sum(1) / length[:, None]
