"""From the hidden states of a prompt's tokens to one vector: their mean, the last one, or learned queries that look.

A mean hears which colours there are and hardly where. "attention" has K queries; what each returns is a mean too,
weighted by what a token's state says and by where the token stands, and beside them is the last state, which has read
everything:

    w_k = softmax over tokens of  <q_k, rmsnorm(h)> + <p_k, place>
    pooled = [sum of w_1 h, ..., sum of w_K h, last h]                          [(K + 1) * hidden]

A token's place is its part (input or output) and three low frequencies of its row and of its column, each as a share of
its grid's, so that a query can ask for the top left of the outputs whatever their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_fused.qwen.prompt_text import EncodedText
from qwen_fused.qwen.tiny import seeded

POOLINGS = ("mean", "last", "attention")
FREQUENCIES = (1, 2, 3)
# numbers that say where a token stands: input, output, and the frequencies of its row and its column
PLACE = 2 + 2 * len(FREQUENCIES)
QUERIES = 8
# of the initial scores of <q, h>: wide enough that the queries differ, and that a gradient says how
SCORE_STD = 2.0


@lru_cache(256)
def grid_places(count: int, shape: tuple[int, int], part: int) -> np.ndarray:
    """Where the tokens of one grid's text stand.

    Args:
        count: tokens; the last ones are a cell each and a row's end each, and what is before them is at the first cell.
        shape: rows and columns of the grid.
        part: 0 for an input, 1 for an output.

    Returns:
        [count, PLACE] float32, not to be written to.
    """
    rows, columns = shape
    cell = np.maximum(np.arange(count) - (count - rows * (columns + 1)), 0)
    row, column = cell // (columns + 1), cell % (columns + 1)
    # a row's end is half a cell behind the border, where a cosine is what it is at the last cell
    shares = (row + 0.5) / rows, (column + 0.5) / columns
    waves = [np.cos(math.pi * frequency * share) for share in shares for frequency in FREQUENCIES]
    parts = [np.full(count, part == number) for number in range(2)]
    return np.stack([*parts, *waves], 1).astype(np.float32)


def text_places(texts: Sequence[EncodedText]) -> Tensor:
    """Where every token of some texts stands: [b, n, PLACE] float32, zeros for rules and pads."""
    places = np.zeros((len(texts), max(len(text.ids) for text in texts), PLACE), dtype=np.float32)
    for row, text in zip(places, texts, strict=True):
        start = len(text.ids) - sum(grid.shown for grid in text.grids)
        for grid in text.grids:
            row[start : start + grid.shown] = grid_places(grid.count, grid.shape, grid.part)[: grid.shown]
            start += grid.shown
    return torch.from_numpy(places)


class AttentionPooling(nn.Module):
    """K learned queries over a prompt's hidden states.

    Args:
        hidden: width of the states.
        queries: K.
        seed: of the initial queries; torch's global generators are not moved.
    """

    def __init__(self, hidden: int, queries: int = QUERIES, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.query = nn.Parameter(torch.randn(queries, hidden) * SCORE_STD / math.sqrt(hidden))
            self.place = nn.Parameter(torch.randn(queries, PLACE))

    def forward(self, hidden: Tensor, place: Tensor, valid: Tensor) -> Tensor:
        """Weighted means [b, K, hidden] of states [b, n, hidden] at places [b, n, PLACE], in the states' type.

        Args:
            hidden: at least float32.
            place: as `text_places` has it.
            valid: [b, n] bool, False for pads.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            states = F.rms_norm(hidden, (hidden.shape[-1],))
            where = place.to(self.place.dtype) @ self.place.t()
            score = states @ self.query.t().to(states.dtype) + where.to(states.dtype)
            weight = score.masked_fill(~valid[..., None], -torch.inf).softmax(1)
            return weight.transpose(1, 2) @ hidden
