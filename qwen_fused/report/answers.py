"""Examples of a run: one episode with its plan, prediction and target, written by the trainer, drawn by the report.

examples.json is a list of {"task_id": str, "index": int, "input": grid, "target": grid or null, "predicted": grid,
"plan": [grid of each planning step, first to last], "backward": [the input as the backward plan makes it of the target,
then its grid beside each planning step, first to last], "demonstrations": [[input, output], ...], "why": str};
everything after "predicted" may be left out. A grid is a list of rows of colours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_fused.arc.scoring import cell_accuracy
from qwen_fused.arc.tasks import parse_grid
from qwen_fused.common.files import write_atomic
from qwen_fused.report.draw_grids import ARC_COLORS, ERROR_COLORS, error_grid

KEYS = ("task_id", "index", "input", "target", "predicted")


@dataclass(frozen=True, eq=False)
class Example:
    """One episode as the report shows it; every grid is [h, w] uint8."""

    task_id: str
    index: int  # which test input of the task
    input: np.ndarray
    target: np.ndarray | None
    predicted: np.ndarray
    plan: tuple[np.ndarray, ...] = ()  # what each planning step would answer, first to last
    backward: tuple[np.ndarray, ...] = ()  # the input as made of the target, then the grid beside each planning step
    demonstrations: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    why: str = ""  # what it is an example of

    def to_dict(self) -> dict[str, Any]:
        """The example as examples.json holds it: plain values, grids as lists of rows."""
        return {
            "task_id": self.task_id,
            "index": int(self.index),
            "input": _rows(self.input),
            "target": None if self.target is None else _rows(self.target),
            "predicted": _rows(self.predicted),
            "plan": [_rows(grid) for grid in self.plan],
            "backward": [_rows(grid) for grid in self.backward],
            "why": self.why,
            "demonstrations": [[_rows(grid) for grid in pair] for pair in self.demonstrations],
        }

    @property
    def solved(self) -> bool:
        """The prediction is the target."""
        return self.target is not None and np.array_equal(self.predicted, self.target)

    @property
    def cells_right(self) -> float | None:
        """Share of the target's cells that the prediction has right; None where no target is known."""
        return None if self.target is None else cell_accuracy(self.predicted, self.target)

    @property
    def verdict(self) -> str:
        """How the prediction did, in words."""
        if self.cells_right is None:
            return "no answer known"
        return "solved" if self.solved else f"{100 * self.cells_right:.1f} % of cells right"

    @property
    def row(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Caption, grid and colour table of each picture, from input to errors."""
        row = [("input", self.input, ARC_COLORS)]
        row += [(f"step {number + 1}", grid, ARC_COLORS) for number, grid in enumerate(self.plan)]
        row.append(("predicted", self.predicted, ARC_COLORS))
        if self.target is not None:
            row.append(("target", self.target, ARC_COLORS))
            row.append(("errors", error_grid(self.predicted, self.target), ERROR_COLORS))
        return row

    @property
    def backward_row(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """The backward plan, each grid where `row` has its forward counterpart."""
        return [
            (f"back {number}" if number else "made back", grid, ARC_COLORS) for number, grid in enumerate(self.backward)
        ]

    @property
    def cell(self) -> int:
        """Pixels of a cell: one size for all grids, so that they compare, and nine of them fit in a row."""
        side = max(side for _, grid, _ in self.row for side in grid.shape)
        return int(np.clip(114 // side, 3, 18))


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Write examples.json.

    Raises:
        ValueError: one of an example's grids is not a grid; the message says which. Nothing is written then.
    """
    write_atomic(Path(path), json.dumps(plain_examples(examples, "examples")))


def plain_examples(examples: Iterable[Example], source: str) -> list[dict[str, Any]]:
    """Examples as examples.json holds them, checked as they are when they are read; ValueError as `read_examples`."""
    plain = [example.to_dict() for example in examples]
    read_examples(plain, source)
    return plain


def read_examples(content: Sequence[Any], source: str) -> list[Example]:
    """The examples of a parsed examples.json.

    Raises:
        ValueError: an example lacks a key, or one of its grids is not a grid; the message says which.
    """
    return [read_example(example, f"{source}[{number}]") for number, example in enumerate(content)]


def read_example(content: Any, where: str) -> Example:
    """One example, every grid of it checked; ValueError names `where`, the key and what is wrong."""
    if not isinstance(content, Mapping) or not set(KEYS) <= set(content):
        got = ", ".join(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{where} must have {', '.join(KEYS)}, got {got}")

    def grid(key: str, value: Any) -> np.ndarray:
        try:
            return parse_grid(value)
        except ValueError as error:
            raise ValueError(f"{where}, {key}: the grid {error}") from error

    for key in ("plan", "backward", "demonstrations"):
        if not isinstance(content.get(key, []), list):
            raise ValueError(f"{where}, {key} must be a list, got {type(content[key]).__name__}")
    pairs = content.get("demonstrations", [])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{where}, demonstrations must be pairs of grids")
    return Example(
        task_id=str(content["task_id"]),
        index=int(content["index"]),
        input=grid("input", content["input"]),
        target=None if content["target"] is None else grid("target", content["target"]),
        predicted=grid("predicted", content["predicted"]),
        plan=tuple(grid("plan", step) for step in content.get("plan", [])),
        backward=tuple(grid("backward", step) for step in content.get("backward", [])),
        demonstrations=tuple((grid("demonstrations", a), grid("demonstrations", b)) for a, b in pairs),
        why=str(content.get("why", "")),
    )


def _rows(grid: Any) -> Any:
    return np.asarray(grid).tolist()
