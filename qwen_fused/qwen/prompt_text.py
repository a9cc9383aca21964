"""The text of a prompt: a sentence that names the rule, then each demonstration pair as rows of digits; as token ids.

    The output replaces colours ...
    in:
    077
    700
    out:
    ...

With Qwen's tokenizer and with the byte-level one a cell is one token. A text that is too long keeps as many whole pairs
as it has room for: it loses its largest ones. Where none fits whole, the smallest keeps the top of its input and the
top of its output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen_fused.arc.features import RULES, pair_features, rule_sentence
from qwen_fused.arc.tasks import Pair

INPUT, OUTPUT = "in:\n", "out:\n"
# texts that are one token each where the vocabulary is ours
ADDED_TOKENS = (*RULES.values(), INPUT, OUTPUT)


@dataclass(frozen=True)
class EncodedPair:
    """A demonstration pair as token ids: made once per distinct text."""

    input_ids: np.ndarray  # [n] int64
    output_ids: np.ndarray  # [m] int64
    shapes: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of both grids
    features: np.ndarray  # [15] float32

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.output_ids)

    def truncated(self, room: int) -> list[np.ndarray]:
        """The ids of both grids; cut to `room`, each in proportion, so that something of both is seen."""
        if len(self) <= room:
            return [self.input_ids, self.output_ids]
        share = min(max(room * len(self.input_ids) // len(self), 1), room - 1)
        return [self.input_ids[:share], self.output_ids[: room - share]]


@dataclass(frozen=True)
class GridSpan:
    """The tokens of one grid in a text: one after the other, up to the text's end."""

    shown: int  # tokens in the text
    count: int  # tokens that it would have had uncut
    shape: tuple[int, int]  # rows and columns
    part: int  # 0 for an input, 1 for an output


@dataclass(frozen=True)
class EncodedText:
    """One prompt's text as token ids, and what did not fit."""

    ids: np.ndarray  # [n] int64
    grids: tuple[GridSpan, ...]  # behind the rule
    features: np.ndarray  # [15] float32, mean over all its demonstrations, those that did not fit included
    full_length: int  # tokens that it would have had with room for everything
    dropped_pairs: int  # left out whole

    @property
    def truncated(self) -> bool:
        """Whether anything was left out: whole pairs, or a part of the first."""
        return self.full_length > len(self.ids)


@dataclass(frozen=True)
class Truncation:
    """What texts lose to the most tokens that a prompt may have, counted over many of them."""

    prompts: int
    truncated_prompts: int
    pairs: int
    dropped_pairs: int  # left out whole
    longest: int  # tokens of the longest text, had it all its pairs


def describe_cut(lost: Mapping[str, Truncation], max_tokens: int) -> str | None:
    """What the prompts of each set lose, and the flag to change; None where none loses anything.

    Args:
        lost: by the name of the set, which may be empty.
        max_tokens: of a prompt.
    """
    if not any(truncation.truncated_prompts for truncation in lost.values()):
        return None
    known = {name: t for name, t in lost.items() if t.prompts}
    shares = " and ".join(
        f"{t.truncated_prompts} of {t.prompts} {name} prompts".replace("  ", " ") for name, t in known.items()
    )
    return (
        f"Cut to {max_tokens} tokens: {shares}, without {sum(t.dropped_pairs for t in lost.values())} of their "
        f"{sum(t.pairs for t in lost.values())} demonstration pairs. The longest has "
        f"{max(t.longest for t in lost.values())} tokens; a larger --max-prompt-tokens keeps more, for more time and "
        "memory."
    )


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """As many of these as fit into `room` together, in their order; the shortest one where none does."""
    ranked = sorted(range(len(lengths)), key=lambda index: lengths[index])
    chosen: list[int] = []
    for index in ranked:
        room -= lengths[index]
        if chosen and room < 0:
            break
        chosen.append(index)
    return sorted(chosen)


def grid_text(grid: np.ndarray) -> str:
    """A grid as one digit per cell and one newline per row: "077\\n700\\n"."""
    rows = np.full((grid.shape[0], grid.shape[1] + 1), ord("\n"), dtype=np.uint8)
    rows[:, :-1] = grid + ord("0")
    return rows.tobytes().decode("ascii")


class PromptText:
    """Encodes demonstrations as the token ids of their prompts' texts.

    Args:
        tokenizer: of the backbone.
        max_tokens: the most tokens of one prompt.
        positions: of the backbone, which no prompt may exceed.

    Raises:
        ValueError: `max_tokens` has no room for a rule and something of a pair, or is more than `positions`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, positions: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.rule_ids = {sentence: self._tokenise([sentence + "\n"])[0] for sentence in RULES.values()}
        longest_rule = max(map(len, self.rule_ids.values()))
        if not longest_rule + 2 <= max_tokens <= positions:
            raise ValueError(
                f"max_prompt_tokens must be from {longest_rule + 2} (a rule and something of a pair) to "
                f"{positions} (this Qwen's positions), got {max_tokens}"
            )
        self._cache: OrderedDict[str, EncodedPair] = OrderedDict()
        self.cache_size = 8192

    def encode(self, demonstrations: Sequence[Sequence[Pair]]) -> list[EncodedText]:
        """The texts of B episodes.

        Args:
            demonstrations: B episodes of at least one pair each, every pair with its output.

        Raises:
            ValueError: no episode, an episode without demonstrations, or a pair without output.
        """
        return [self._text(pairs) for pairs in self._pairs(demonstrations)]

    def truncation(self, demonstrations: Iterable[Sequence[Pair]]) -> Truncation:
        """What these episodes' texts lose to `max_tokens`."""
        episodes = list(demonstrations)
        texts = self.encode(episodes) if episodes else []
        return Truncation(
            prompts=len(texts),
            truncated_prompts=sum(text.truncated for text in texts),
            pairs=sum(map(len, episodes)),
            dropped_pairs=sum(text.dropped_pairs for text in texts),
            longest=max((text.full_length for text in texts), default=0),
        )

    def _text(self, pairs: Sequence[EncodedPair]) -> EncodedText:
        features = np.stack([pair.features for pair in pairs]).mean(0, dtype=np.float32)
        rule = self.rule_ids[rule_sentence(features)]
        room = self.max_tokens - len(rule)
        shown = fitting([len(pair) for pair in pairs], room)
        pieces, grids = [rule], []
        for pair in (pairs[index] for index in shown):
            both = zip(pair.truncated(room), (pair.input_ids, pair.output_ids), pair.shapes, strict=True)
            for part, (ids, whole, shape) in enumerate(both):
                pieces.append(ids)
                grids.append(GridSpan(len(ids), len(whole), shape, part))
        full_length = len(rule) + sum(map(len, pairs))
        return EncodedText(np.concatenate(pieces), tuple(grids), features, full_length, len(pairs) - len(shown))

    def _pairs(self, demonstrations: Sequence[Sequence[Pair]]) -> list[list[EncodedPair]]:
        """Every pair from the cache, the new ones tokenised in one call."""
        if len(demonstrations) == 0:
            raise ValueError("demonstrations must hold at least one episode, got none")
        keys: list[list[str]] = []
        new: dict[str, tuple[str, str, Pair]] = {}
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
                    new[key] = (*texts, pair)
        if new:
            ids = self._tokenise([text for first, second, _ in new.values() for text in (first, second)])
            for number, (key, (_, _, pair)) in enumerate(new.items()):
                assert pair.output is not None
                shapes, features = (pair.input.shape, pair.output.shape), pair_features(pair.input, pair.output)
                self._cache[key] = EncodedPair(ids[2 * number], ids[2 * number + 1], shapes, features)
        encoded = [[self._cache[key] for key in episode] for episode in keys]
        for episode in keys:
            for key in episode:
                self._cache.move_to_end(key)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return encoded

    def _tokenise(self, texts: list[str]) -> list[np.ndarray]:
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [np.asarray(ids, dtype=np.int64) for ids in batch["input_ids"]]
