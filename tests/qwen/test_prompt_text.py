"""The text of a prompt is tokenised once per pair, holds every cell that there is room for, and says what it lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from demonstrations import DEMONSTRATIONS, pair, text_of

from qwen_fused.arc.episodes import Pair
from qwen_fused.arc.features import RULES
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.qwen.prompt_text import ADDED_TOKENS, INPUT, OUTPUT, PromptText, Truncation, fitting, grid_text
from qwen_fused.qwen.tiny import byte_tokenizer


def make(max_tokens: int = 512) -> PromptText:
    return PromptText(byte_tokenizer(ADDED_TOKENS), max_tokens, 8192)


def test_grid_text():
    assert grid_text(np.array([[0, 7, 7], [7, 0, 0]], dtype=np.uint8)) == "077\n700\n"


def test_ids_are_those_of_the_whole_text():
    text = make()
    for pairs, encoded in zip(DEMONSTRATIONS, text.encode(DEMONSTRATIONS), strict=True):
        assert encoded.ids.tolist() == text.tokenizer(text_of(pairs))["input_ids"]
        assert (encoded.full_length, encoded.dropped_pairs, encoded.truncated) == (len(encoded.ids), 0, False)


def test_features_are_the_mean_over_pairs():
    grids = {text: np.array([[int(cell) for cell in text]], np.uint8) for text in ("12", "1", "1212")}
    pairs = [Pair(grids["12"], grids["1"]), Pair(grids["12"], grids["1212"])]
    both, first = make().encode([pairs, pairs[:1]])
    assert both.features[0] == pytest.approx((0.5 + 2) / 2) and both.features.dtype == np.float32
    assert first.features[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("demonstrations", "message"),
    [
        ([], "at least one episode"),
        ([[pair(0)], []], "at least one pair each, got none for episode 1"),
        ([[pair(0), Pair(pair(1).input, None)]], "a pair without in episode 0"),
    ],
)
def test_rejects_missing_demonstrations(demonstrations, message):
    with pytest.raises(ValueError, match=message):
        make().encode(demonstrations)


def test_as_many_whole_pairs_are_kept_as_fit():
    # a rule and its newline are two tokens, a pair of 4 x 5 grids 2 + 2 * 24
    prompt = QwenPrompt(dim=16, max_prompt_tokens=2 + 2 * 50)
    pairs = [pair(seed) for seed in range(4)]
    episodes = [pairs, pairs[:2], pairs[:3]]
    texts = prompt.prompt_text.encode(episodes)
    assert [(len(t.ids), t.full_length, t.dropped_pairs) for t in texts] == [
        (102, 202, 2),
        (102, 102, 0),
        (102, 152, 1),
    ]
    assert [t.truncated for t in texts] == [True, False, True]
    assert prompt(episodes).truncated == pytest.approx(2 / 3)
    # the shown pairs are the first two; the rule and the control half still speak of all
    changed = [*pairs[:3], pair(99)]
    got, want = prompt([changed]), prompt([pairs])
    assert torch.equal(got.text_embedding, want.text_embedding) and not torch.equal(got.control, want.control)
    # the largest is the one that goes, wherever it stands, and the others keep their order
    small, large = pair(9, 1, 1), pair(9, 6, 6)
    several = [[pairs[0], large, small], [large, pairs[0], small], [pairs[0], small]]
    first, second, both = prompt.prompt_text.encode(several)
    assert [t.dropped_pairs for t in (first, second, both)] == [1, 1, 0]
    rule = len(both.ids) - 50 - 6
    assert first.ids[rule:].tolist() == second.ids[rule:].tolist() == both.ids[rule:].tolist()


@pytest.mark.parametrize(
    ("lengths", "room", "shown"),
    [
        ([3, 9, 2], 5, [0, 2]),
        ([9, 8], 5, [1]),
        ([5], 5, [0]),
        ([4, 4, 4], 8, [0, 1]),
        ([1, 5, 1, 5, 1], 9, [0, 1, 2, 4]),
    ],
)
def test_fitting(lengths, room, shown):
    assert fitting(lengths, room) == shown


def test_where_no_pair_fits_the_smallest_keeps_the_top_of_both_grids():
    text = make(100)
    long, longer = pair(0, 30, 30, output=(30, 14)), pair(1, 30, 30)
    cut, short = text.encode([[longer, long], [long, pair(1, 1, 1)]])
    assert (len(cut.ids), cut.dropped_pairs, cut.truncated) == (100, 1, True)
    assert (len(short.ids), short.dropped_pairs, short.truncated) == (2 + 6, 1, True)
    before, after = text.tokenizer.decode(cut.ids).split(OUTPUT)
    assert (INPUT + grid_text(long.input)).startswith(before.split("\n", 1)[1]) and len(before) > 60
    assert grid_text(long.output).startswith(after) and len(after) > 20
    # the only pair, cut: nothing is dropped, and still something is lost
    (alone,) = text.encode([[long]])
    assert (alone.dropped_pairs, alone.truncated) == (0, True)


def test_truncation_is_counted_over_prompts():
    text = make(2 + 2 * 50)
    pairs = [pair(seed) for seed in range(4)]
    episodes = [pairs, pairs[:2], pairs[:3], [pair(0, 30, 30)]]
    full = 2 + 2 + 2 * 30 * 31
    assert text.truncation(episodes) == Truncation(4, 3, 4 + 2 + 3 + 1, 2 + 1, full)
    assert text.truncation([]) == Truncation(0, 0, 0, 0, 0)


def test_nothing_is_tokenised_twice(monkeypatch):
    prompt = QwenPrompt(dim=16)
    seen: list[str] = []
    tokenise = prompt.prompt_text._tokenise
    monkeypatch.setattr(prompt.prompt_text, "_tokenise", lambda texts: seen.extend(texts) or tokenise(texts))
    first = prompt(DEMONSTRATIONS)
    assert len(seen) == 2 * 6
    again = prompt([[pair(0), pair(1), pair(0)], *DEMONSTRATIONS[1:]])
    assert len(seen) == 2 * 6
    torch.testing.assert_close(again.text_embedding[1:], first.text_embedding[1:], rtol=1e-4, atol=1e-5)


def test_cache_is_bounded_and_a_batch_may_be_larger():
    small, large = make(), make()
    small.cache_size = 2
    for ours, theirs in zip(small.encode(DEMONSTRATIONS), large.encode(DEMONSTRATIONS), strict=True):
        assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.features, theirs.features)
    assert len(small._cache) == 2 and len(large._cache) == 6


def test_rules_are_known_to_the_tokenizer():
    rule_ids = make().rule_ids
    assert set(rule_ids) == set(RULES.values())
    assert all(len(ids) == 2 for ids in rule_ids.values())
