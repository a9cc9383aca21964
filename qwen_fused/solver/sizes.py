"""The answer's size where every demonstration follows one rule: constant, or a ratio of the input's sides."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from qwen_fused.arc.episodes import MAX_SIDE, Task

Size = tuple[int, int]


def size_rule(task: Task) -> Callable[[Size], Size] | None:
    """The rule from an input's rows and columns to its output's, or None where no rule fits every demonstration.

    The first that fits: the input's own ratio on each axis (the same size is the ratio 1), the same with sides
    swapped, or one size for all.
    """
    sizes = [(pair.input.shape, pair.output.shape) for pair in task.train]  # type: ignore[union-attr]
    for swapped in (False, True):
        ratios = {tuple(Fraction(after[k], before[1 - k if swapped else k]) for k in (0, 1)) for before, after in sizes}
        if len(ratios) == 1:
            return _by_ratio(ratios.pop(), swapped, constant={after for _, after in sizes})
    outputs = {after for _, after in sizes}
    if len(outputs) == 1:
        only = outputs.pop()
        return lambda size: only  # noqa: ARG005
    return None


def _by_ratio(ratio: tuple[Fraction, ...], swapped: bool, constant: set[Size]) -> Callable[[Size], Size]:
    def rule(size: Size) -> Size:
        sides = [ratio[k] * size[1 - k if swapped else k] for k in (0, 1)]
        if all(side.denominator == 1 and 1 <= side <= MAX_SIDE for side in sides):
            return int(sides[0]), int(sides[1])
        if len(constant) == 1:
            # a ratio that came about by chance: all demonstrations are of one size, and the query is not
            return next(iter(constant))
        rows, columns = (min(max(round(side), 1), MAX_SIDE) for side in sides)
        return rows, columns

    return rule
