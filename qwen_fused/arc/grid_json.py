"""JSON of ARC files, with every good grid taken out of the text before it is parsed.

Nearly all of such a file are the cells of grids. To the JSON parser each is an object, and a check of each is another
step in Python: 10,000 tasks took 7 s. So a pattern finds what looks like a grid, a few calls on its bytes check its
cells, and the parser sees a number in its place. What is no good grid (ragged, too large, a colour of 12) stays as it
is, for `parse_grid` to say what is wrong with it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from qwen_fused.arc.tasks import COLORS, MAX_SIDE

# of each byte that spells a digit, the digit
VALUES = bytes.maketrans(b"0123456789", bytes(range(COLORS)))

SPACE = rb"[ \t\r\n]*"
ROW = rb"\[[0-9, \t\r\n]+\]"
# a string as a whole first: what looks like a grid in one, as in BARC's source code, is none
STRING_OR_GRID = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*"|(\[' + SPACE + ROW + rb"(?:" + SPACE + rb"," + SPACE + ROW + rb")*" + SPACE + rb"\])",
    re.DOTALL,
)


def load_json(text: bytes) -> Any:
    """`json.loads`, with each good grid as a read-only [h, w] uint8 array in place of lists.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    # a number that the text does not have
    mark = b"8."
    while mark in text:
        mark = b"8" + mark
    grids: list[np.ndarray] = []

    def without_grid(match: re.Match[bytes]) -> bytes:
        found = match[1]
        grid = None if found is None else grid_in(found)
        if grid is None:
            return match[0]
        grids.append(grid)
        return b"%b%d" % (mark, len(grids) - 1)

    def number(spelt: str) -> Any:
        return grids[int(spelt[len(prefix) :])] if spelt.startswith(prefix) else float(spelt)

    prefix = mark.decode()
    try:
        return json.loads(STRING_OR_GRID.sub(without_grid, text), parse_float=number)
    except ValueError:
        # told with the lines and columns of the text itself
        return json.loads(text)


def grid_in(text: bytes) -> np.ndarray | None:
    """The grid that a piece of JSON spells; None where it is no good one."""
    rows = text.translate(None, b" \t\r\n")[2:-2].split(b"],[")
    height, width = len(rows), len(rows[0])
    joined = b",".join(rows)
    cells, commas = joined[::2], joined[1::2]
    # each row a digit, then commas and digits in turn; bytes' own methods take a fifth of numpy's time on so few
    regular = width % 2 == 1 and set(map(len, rows)) == {width} and commas.count(b",") == len(commas)
    if not regular or not cells.isdigit() or max(height, width // 2 + 1) > MAX_SIDE:
        return None
    return np.frombuffer(cells.translate(VALUES), np.uint8).reshape(height, -1)
