"""Rewrite the table of docs/proof.md that tells what the proof was tried on, from the committed cases: `make docs`.

Counts come from tests/helpers: the loops of `proof_sweep`, healthy all of them, and the cases of `proof_field`, healthy
and broken. The tests `tests/proof/test_field.py` and `tests/proof/test_sweep.py` hold every one of them to its answer.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "proof.md"
BEGIN, END = "<!-- tried on: written by docs/make_proof_table.py -->", "<!-- end -->"


def render() -> str:
    """The table, with the versions that are installed here."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    field = importlib.import_module("proof_field")
    for more in (
        "field_optimizers",
        "field_faults",
        "field_libraries",
        "field_derivatives",
        "field_stop_gradients",
        "field_changed_gradients",
        "field_types",
        "field_outside",
    ):
        importlib.import_module(more)
    counts: dict[str, Counter[str]] = {}
    for _, library, _ in importlib.import_module("proof_sweep").loops():
        counts.setdefault(library, Counter())["proved"] += 1
    for case in field.CASES:
        answer = case.answer if case.answer in ("proved", "refused") else "broken"
        counts.setdefault(case.library, Counter())[answer] += 1
    lines = [
        "| library | version | cases | healthy, proved | broken, named | refused with the reason |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for library, found in sorted(counts.items()):
        row = [found["proved"], found["broken"], found["refused"]]
        lines.append(
            f"| {library} | {version(library).partition('+')[0]} | {sum(row)} | {row[0]} | {row[1]} | {row[2]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Put the table between its marks."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{render()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
