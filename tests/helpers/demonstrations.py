"""Demonstration pairs with random cells, for tests of the prompt and of its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_fused.arc.episodes import Pair
from qwen_fused.arc.features import pair_features, rule_sentence
from qwen_fused.qwen.prompt_text import INPUT, OUTPUT, grid_text


def pair(seed: int, h: int = 4, w: int = 5, output: tuple[int, int] | None = None) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(rng.integers(0, 10, (h, w), dtype=np.uint8), rng.integers(0, 10, output or (h, w), dtype=np.uint8))


def mean_features(pairs: Sequence[Pair]) -> np.ndarray:
    """The features of a task: the mean over its demonstration pairs."""
    return np.stack([pair_features(p.input, p.output) for p in pairs if p.output is not None]).mean(0, dtype=np.float32)


def text_of(pairs: Sequence[Pair]) -> str:
    """The prompt's text, written out by hand."""
    text = rule_sentence(mean_features(pairs)) + "\n"
    for p in pairs:
        text += INPUT + grid_text(p.input) + OUTPUT + grid_text(p.output)
    return text


DEMONSTRATIONS = [[pair(0), pair(1)], [pair(2, 9, 3)], [pair(3, 2, 2), pair(4, 6, 6), pair(5, 1, 1)]]
