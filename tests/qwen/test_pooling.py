"""An attention pooling knows where each token stands, and hears the order of a grid's cells."""

import numpy as np
import pytest
import torch
from qwens import qwen_tokenizer

from qwen_fused.arc.episodes import Pair
from qwen_fused.qwen.pooling import FREQUENCIES, PLACE, AttentionPooling, grid_places, text_places
from qwen_fused.qwen.prompt_text import ADDED_TOKENS, PromptText
from qwen_fused.qwen.tiny import byte_tokenizer


def waves(share: float) -> list[float]:
    return [np.cos(np.pi * frequency * share) for frequency in FREQUENCIES]


def test_places_of_a_grid():
    # "out:\n" as two tokens, then 12\n34\n56\n
    got = grid_places(2 + 9, (3, 2), 1)
    rows, columns = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    want = [[0, 1, *waves((r + 0.5) / 3), *waves((c + 0.5) / 2)] for r, c in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("tokenizer", [lambda: byte_tokenizer(ADDED_TOKENS), qwen_tokenizer])
@pytest.mark.parametrize("room", [1000, 60, 25])
def test_places_belong_to_the_tokens_of_a_text(tokenizer, room):
    """Of grids that hold their own row and column, in texts that keep all pairs, some, or a part of one."""
    tokenizer = tokenizer()
    shapes = [(9, 7), (5, 3), (8, 8)]
    by_row, by_column = (
        [Pair(grid, grid) for grid in (np.indices(shape)[axis].astype(np.uint8) for shape in shapes)] for axis in (0, 1)
    )
    rule = len(PromptText(tokenizer, 1000, 8192).encode([by_row])[0].ids) - 2 * sum(h * (w + 1) for h, w in shapes)
    by_row, by_column = PromptText(tokenizer, rule + room, 8192).encode([by_row, by_column])
    assert by_row.truncated == (room < 1000)
    place = text_places([by_row])[0]
    assert torch.equal(place, text_places([by_column])[0]) and place.shape == (len(by_row.ids), PLACE)
    spelt = [[tokenizer.decode([token]) for token in encoded.ids] for encoded in (by_row, by_column)]
    shown = [grid for grid in by_row.grids for _ in range(grid.shown)]
    rule = len(by_row.ids) - len(shown)
    assert not place[:rule].any() and rule > 0
    cells = 0
    for here, row, column, grid in zip(place[rule:], spelt[0][rule:], spelt[1][rule:], shown, strict=True):
        assert here[:2].tolist() == [grid.part == 0, grid.part == 1]
        if row.isdigit() and column.isdigit():
            cells += 1
            (h, w), (r, c) = grid.shape, (int(row), int(column))
            np.testing.assert_allclose(here[2:], [*waves((r + 0.5) / h), *waves((c + 0.5) / w)], atol=1e-5)
    assert cells >= 15


def test_a_query_returns_a_mean_weighted_by_state_and_place():
    pooling = AttentionPooling(4, queries=2)
    hidden, place = torch.randn(1, 3, 4), torch.randn(1, 3, PLACE)
    valid = torch.tensor([[True, True, False]])
    with torch.no_grad():
        got = pooling(hidden, place, valid)[0]
        states = hidden[0] / hidden[0].square().mean(1, keepdim=True).sqrt()
        for k in range(2):
            score = states[:2] @ pooling.query[k] + place[0, :2] @ pooling.place[k]
            torch.testing.assert_close(got[k], score.softmax(0) @ hidden[0, :2])


def test_the_same_states_at_other_places_are_something_else():
    """Where a mean hears nothing at all: states that know of no neighbour, in another order."""
    torch.manual_seed(5)
    pooling, place = AttentionPooling(32), torch.from_numpy(grid_places(8 * 9, (8, 8), 0))[None]
    hidden = torch.randn(1, 8 * 9, 32)
    valid = torch.ones(1, 8 * 9, dtype=torch.bool)
    with torch.no_grad():
        own, shuffled = (pooling(h, place, valid) for h in (hidden, hidden[:, torch.randperm(8 * 9)]))
        pooling.place.zero_()
        blind, blind_shuffled = (pooling(h, place, valid) for h in (hidden, hidden.flip(1)))
    assert (own - shuffled).norm() > 0.3 * own.norm()
    torch.testing.assert_close(blind, blind_shuffled)
