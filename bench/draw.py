"""A result as pictures: where the kernels stand under the device's roofline, and bars against the other contenders."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from qwen_fused.report.curves import INK

# inches of a page that title and caption take
HEAD = 0.6
OURS, OTHERS = INK["series-1"], "#b9b7b0"
# of a bench with several comparisons of one case, what the bars show
SHOWN = {"efe_loss": (", both",), "grad_norm": (", measure", ", measure + clip")}
# less than this is in a cache: no roofline of memory stands above it
LARGE = 1e7


def caption(record: dict) -> str:
    """What the figures belong to."""
    m = record["machine"]
    threads = "" if m["kind"] == "cuda" else f", {m['threads']} threads"
    return f"{m['device']}{threads}, torch {m['torch']}, commit {m['commit']}{' with changes' if m['dirty'] else ''}"


def figure(width: float, height: float, title: str, record: dict) -> Figure:
    """An empty page with title and caption above what is drawn on it."""
    page = Figure(figsize=(width, height), dpi=150, facecolor=INK["surface"], layout="constrained")
    page.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 0.98 - HEAD / height), w_pad=0.08)
    page.text(0.015, 1 - 0.2 / height, title, fontsize=12, fontweight="bold", color=INK["ink"], va="center")
    page.text(0.015, 1 - 0.43 / height, caption(record), fontsize=8, color=INK["muted"], va="center")
    return page


def plain(axes) -> None:
    """The house's axes: no box, muted ticks."""
    axes.set_facecolor(INK["surface"])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK["rule"])
    axes.tick_params(colors=INK["muted"], labelsize=8, length=0, which="both")


def roofline(record: dict, to: Path) -> bool:
    """Operations per byte against operations per second; False where no row moves enough bytes."""
    rows = [row for row in record["rows"] if row["bytes"] and row["bytes"] >= LARGE and row["operations"]]
    if not rows:
        return False
    top = record["ceilings"]
    peak, copy, read = top["fp32_gflop_per_s"], top["copy_gb_per_s"], top["read_gb_per_s"]
    page = figure(9, 5, "Under the roofline", record)
    axes, key = page.subplots(1, 2, width_ratios=[1.7, 1])
    plain(axes)
    intensity = [row["operations"] / row["bytes"] for row in rows]
    left, right = min(intensity) / 1.6, 3 * max(peak / min(copy, read), *intensity)
    for rate, name, style in ((copy, "copy", "-"), (read, "read", "--")):
        knee = peak / rate
        axes.plot([left, knee], [left * rate, peak], style, color=INK["ink"], lw=1.2, label=f"{name} {rate:.0f} GB/s")
    axes.plot([peak / max(copy, read), right], [peak, peak], color=INK["ink"], lw=1.2)
    axes.annotate(f"fp32 without matrix units {peak:.0f} GFLOP/s", (right, peak), (-2, 5), ha="right", fontsize=8,
                  textcoords="offset points", color=INK["ink"])  # fmt: skip
    lines = []
    for row, x in zip(rows, intensity, strict=True):
        y = row["operations"] / (row.get("device_ms") or row["ms"]) / 1e6
        axes.scatter(x, y, s=110 if row["ours"] else 16, color=OURS if row["ours"] else OTHERS, zorder=3 + row["ours"])
        if row["ours"]:
            lines.append(f"{len(lines) + 1}  {short(row)}\n     {row['gb_per_s']:.0f} GB/s")
            axes.annotate(str(len(lines)), (x, y), ha="center", va="center", fontsize=7, color="white", zorder=5)
    axes.scatter([], [], color=OURS, s=60, label="ours")
    axes.scatter([], [], color=OTHERS, s=16, label="the others in the same comparison")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, 1.6 * peak))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations per byte that has to move", fontsize=9, color=INK["muted"])
    axes.set_ylabel("Goperations/s", fontsize=9, color=INK["muted"])
    axes.grid(color=INK["rule"], lw=0.5)
    key.set_axis_off()
    key.legend(*axes.get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower left", labelcolor=INK["ink"])
    key.text(0, 1, "\n".join(lines), fontsize=7.5, color=INK["ink"], va="top", linespacing=1.4)
    page.savefig(to)
    return True


def short(row: dict) -> str:
    """A comparison's name on a picture."""
    parts = row["case"].split(", ")
    if row["bench"] == "efe_loss":
        size, _, dtype = parts[0].split(" ")
        return f"efe_loss {size} {dtype}, {parts[1]}"
    return f"grad_norm {parts[0]} {parts[1].split()[-1]}, {', '.join(parts[2:])}"


def bars(record: dict, to: Path) -> bool:
    """Time of each contender over ours, a panel for each comparison; False where there is none."""
    shown = [row for row in record["rows"] if row["case"].endswith(SHOWN.get(row["bench"], ""))]
    panels = list(dict.fromkeys((row["bench"], row["case"]) for row in shown))
    if not panels:
        return False
    members = {panel: [r for r in shown if (r["bench"], r["case"]) == panel] for panel in panels}
    columns = 2 if len(panels) > 1 else 1
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    most = [max(len(members[panel]) for panel in line) for line in lines]
    height = HEAD + 0.24 * sum(most) + 0.42 * len(lines)
    page = figure(5.8 * columns, height, "Time against ours, in the same run (shorter is faster)", record)
    grid = page.subplots(len(lines), columns, squeeze=False, height_ratios=most)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, panel in enumerate(panels):
        axes, rows = grid[number // columns][number % columns], members[panel][::-1]
        axes.set_axis_on()
        plain(axes)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        ratios = [row["times_ours"] for row in rows]
        axes.barh(range(len(rows)), ratios, 0.68, color=[OURS if row["ours"] else OTHERS for row in rows])
        for y, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
            axes.annotate(label(row), (ratio, y), (4, 0), va="center", fontsize=8, textcoords="offset points",
                          color=INK["ink"])  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["who"] for row in rows], color=INK["ink"])
        # bars as thick as those of the panel beside it
        axes.set(xlim=(0, 1.5 * max(ratios)), ylim=(len(rows) - most[number // columns] - 0.5, len(rows) - 0.5))
        axes.set_title(f"{panel[0]}: {panel[1]}", loc="left", fontsize=8, color=INK["muted"])
    page.savefig(to)
    return True


def label(row: dict) -> str:
    """What stands at the end of a bar."""
    figure = f"{row['ms']:.3g} ms" if row["episodes_per_s"] is None else f"{row['episodes_per_s']:.3g} episodes/s"
    return figure if row["ours"] else f"{row['times_ours']:.1f}x, {figure}"
