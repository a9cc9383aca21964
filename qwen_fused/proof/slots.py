"""Tell the calls of one evaluation from each other, so that another evaluation's calls can be matched with them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from qwen_fused.proof import frames


class Slot(NamedTuple):
    """The number-th call of a function from one line of source during an evaluation."""

    name: str
    file: str
    line: int
    number: int


class Collectives:
    """Gives each call of torch.distributed's its slot: by number, as all processes make them in one order."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> Slot:
        """The slot of the call that is being made now."""
        self._count += 1
        return Slot("c10d", "", 0, self._count)


class Slots:
    """Gives each call of an evaluation its slot."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def next(self, name: str) -> Slot:
        """The slot of the call that is being made now."""
        place = (name, *frames.line_of_call())
        self._counts[place] += 1
        return Slot(*place, self._counts[place])
