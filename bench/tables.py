"""The tables of docs/performance.md, from the results that are committed."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
# columns that a GPU's rows have besides; the device's own time has no gap between launches in it
ON_CUDA = ("device_ms", "launches", "syncs")
BEGIN, END = "<!-- written by qwen-fused bench --redraw: begin -->", "<!-- end -->"


def refresh(results: Path) -> Path:
    """Write the document's figures anew between its marks.

    Raises:
        ValueError: the document has no marks.
    """
    text = DOCUMENT.read_text()
    if BEGIN not in text or END not in text.split(BEGIN)[1]:
        raise ValueError(f"{DOCUMENT} must have the marks {BEGIN} and {END}, got none")
    head, rest = text.split(BEGIN, 1)
    found = [json.loads(path.read_text()) | {"path": path} for path in sorted(results.glob("*.json"))]
    parts = [section(record) for record in found]
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{''.join(parts)}{END}{rest.split(END, 1)[1]}")
    return DOCUMENT


def section(record: dict) -> str:
    """One device: what it is, its ceilings, every comparison; a commit with + had changes on top."""
    m, c, stem = record["machine"], record["ceilings"], record["path"].stem
    driver = f", driver {m['driver']}, CUDA {m['cuda']}" if m["kind"] == "cuda" else f", {m['threads']} threads"
    lines = [
        f"### {m['device']}\n",
        wrapped(
            f"{m['date']}, torch {m['torch']}, Triton {m['triton']}, Python {m['python']}{driver}; "
            f"clocks {rates(m['clocks'])}, at the end {rates(m['clocks_at_end'])}."
        ),
        wrapped(
            f"Ceilings, measured: copy {c['copy_gb_per_s']:.1f} GB/s, read {c['read_gb_per_s']:.1f} GB/s, "
            f"fp32 without matrix units {c['fp32_gflop_per_s']:.0f} GFLOP/s."
        ),
    ]
    for kind in ("roofline", "bars"):
        # no picture was drawn where there was nothing to draw
        if record["path"].with_name(f"{stem}-{kind}.png").is_file():
            lines.append(f"![{kind}](../bench/results/{stem}-{kind}.png)\n")
    for (bench, commit), rows in itertools.groupby(record["rows"], key=lambda row: (row["bench"], row["commit"])):
        found = list(rows)
        loads = [row["load"] for row in found]
        lines.append(f"`{bench}`, commit {commit}, load {min(loads)} to {max(loads)}:\n")
        lines += [table(found, c, m["kind"] == "cuda"), ""]
    return "\n".join(lines) + "\n"


def wrapped(prose: str) -> str:
    """A paragraph as `make lint` wants it."""
    return textwrap.fill(prose, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def rates(clocks: dict) -> str:
    """Clock readings as text."""
    known = {name.replace("_", " "): value for name, value in clocks.items() if value is not None}
    return ", ".join(f"{name} {value:.0f}" for name, value in known.items()) or "unknown"


def table(rows: list[dict], ceilings: dict, cuda: bool) -> str:
    """Every row; the share is of the ceiling that the work has: reading alone, or reading and writing."""
    head = ["what", "who", "ms [p20, p80]", "× ours", "rate", "of the ceiling", "error", "peak MB"]
    head += ["device ms", "launches", "syncs"] if cuda else []
    lines = ["| " + " | ".join(head) + " |", "| -- " * len(head) + "|"]
    for row in rows:
        rate, share = "", ""
        if row["gb_per_s"] is not None and row["bytes"] >= 1e6:
            reads = row["case"].endswith((", measure", ", forward", "within bounds"))
            rate = f"{row['gb_per_s']:.1f} GB/s"
            share = f"{100 * row['gb_per_s'] / ceilings['read_gb_per_s' if reads else 'copy_gb_per_s']:.0f} %"
        if row["episodes_per_s"] is not None:
            rate = f"{row['episodes_per_s']:.1f} episodes/s"
        name = f"`{row['who']}`" if "_" in row["who"] else row["who"]
        who = f"**{name}**" if row["ours"] else name
        cells = [row["case"], who, f"{row['ms']:.3g} [{row['p20']:.3g}, {row['p80']:.3g}]"]
        cells += [f"{row['times_ours']:.2f}", rate, share, "" if row["error"] is None else f"{row['error']:.0e}"]
        cells += ["" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"]
        cells += ["" if row.get(key) is None else f"{row[key]:.4g}" for key in ON_CUDA] if cuda else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
