"""Pictures of a run: curves as matplotlib figures, grids as one-pixel-per-cell PNGs in the ARC colours.

A curve is drawn once and saved twice. In the PNG its colours are as written here; in the SVG each becomes a CSS
variable, so that one picture is right on a light and on a dark page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave

# the palette of arcprize.org, by colour number
ARC_COLORS = np.array(
    [
        (0x00, 0x00, 0x00), (0x1E, 0x93, 0xFF), (0xF9, 0x3C, 0x31), (0x4F, 0xCC, 0x30), (0xFF, 0xDC, 0x00),
        (0x99, 0x99, 0x99), (0xE5, 0x3A, 0xA3), (0xFF, 0x85, 0x1B), (0x87, 0xD8, 0xF1), (0x92, 0x12, 0x31),
    ],
    dtype=np.uint8,
)  # fmt: skip

# error mask: what became of each cell; the alpha lets a quiet cell take the page's colour, light or dark
RIGHT, WRONG, MISSING, EXTRA = range(4)
ERROR_COLORS = np.array(
    [(0x89, 0x87, 0x81, 0x40), (0xE3, 0x49, 0x48, 0xFF), (0xED, 0xA1, 0x00, 0xFF), (0x90, 0x85, 0xE9, 0xFF)], np.uint8
)

# css variable -> its light value; the dark ones are in report.html
INK = {
    "surface": "#fcfcfb",
    "ink": "#0b0b0b",
    "muted": "#7d7b75",
    "rule": "#e1e0d9",
    "series-1": "#2a78d6",
    "series-2": "#1baf7a",
    "series-3": "#eb6834",
}

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qwen-fused",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK["rule"],
    "axes.labelcolor": INK["muted"],
    "axes.facecolor": INK["surface"],
    "figure.facecolor": INK["surface"],
    "text.color": INK["ink"],
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True)
class Chart:
    """One set of axes over the steps of a run."""

    name: str  # file name and anchor
    title: str
    series: Mapping[str, str]  # key of metrics.jsonl -> label
    note: str = ""
    log: bool = False
    share: bool = False  # 0 to 1
    zero: bool = False  # a rule at 0


CHARTS = (
    Chart("loss", "Loss", {"loss": "loss"}, "0.7 objective + 0.3 policy by default; what the step descends."),
    Chart(
        "loss-parts",
        "Parts of the loss",
        {"efe": "EFE", "size_loss": "size", "policy_loss": "policy"},
        "Before they are weighted and added.",
    ),
    Chart("qwen-grad", "Qwen_grad", {"qwen_grad": "Qwen"}, "L2 norm before clipping, log scale.", log=True),
    Chart(
        "gradients",
        "Gradient norms elsewhere",
        {"prompt_grad": "prompt", "agent_grad": "agent", "policy_grad": "policy"},
        "L2 norm before clipping, log scale.",
        log=True,
    ),
    Chart("mask-ratio", "Mask_ratio", {"mask_ratio": "wrong cells"}, "Share of cells answered wrong.", share=True),
    Chart("reward", "Reward", {"reward": "reward"}, "5 x (accuracy with the policy - without it).", zero=True),
    Chart(
        "accuracy",
        "Accuracy in training",
        {"accuracy": "cells", "size_accuracy": "sizes", "solved": "solved"},
        "Augmented training pairs, before the step.",
        share=True,
    ),
    Chart(
        "speed",
        "Episodes per second",
        {"episodes_per_second": "episodes/s"},
        "Data, forward, backward and step together.",
    ),
)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` values around each, fewer at the ends, NaN left out; NaN where all of them are."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    first = np.maximum(np.arange(len(values)) - window // 2, 0)
    last = np.minimum(np.arange(len(values)) + (window + 1) // 2, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def mean_window(steps: int) -> int:
    """How many batches the running mean covers: 50, or a tenth of a short run."""
    return max(1, min(50, steps // 10))


def draw_chart(chart: Chart, metrics: Mapping[str, np.ndarray]) -> Figure | None:
    """The chart of a run's metrics, raw values faint under their running mean; None without any value to show."""
    shown = {key: label for key, label in chart.series.items() if np.isfinite(metrics.get(key, np.nan)).any()}
    if not shown:
        return None
    steps = metrics["step"]
    window = mean_window(len(steps))
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5.6, 2.7))
        # room for the legend where there is one
        axes = figure.add_axes((0.09, 0.16, 0.895, 0.74 if len(shown) > 1 else 0.81))
        axes.margins(x=0.01)
        for color, (key, label) in zip(("series-1", "series-2", "series-3"), shown.items(), strict=False):
            values = np.where(metrics[key] > 0, metrics[key], np.nan) if chart.log else metrics[key]
            few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < 3 else {}
            axes.plot(steps, values, color=INK[color], linewidth=0.8, alpha=0.3, **few)
            axes.plot(steps, running_mean(values, window), color=INK[color], linewidth=1.8, label=label, **few)
        if chart.log:
            axes.set_yscale("log")
        if chart.share:
            axes.set_ylim(-0.02, 1.02)
        if chart.zero:
            axes.axhline(0, color=INK["muted"], linewidth=0.8)
        for start in epoch_starts(metrics):
            axes.axvline(start, color=INK["rule"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.grid(axis="y", color=INK["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("batch")
        if len(shown) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, handlelength=1.2
            )
    return figure


def readings(figure: Figure, chart: Chart, metrics: Mapping[str, np.ndarray]) -> dict:
    """What a pointer over the drawn chart reads: where the axes lie, and the running means at up to 400 steps."""
    (axes,) = figure.axes
    position, steps = axes.get_position(), metrics["step"]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 400)).round().astype(int))
    means = {
        label: running_mean(metrics[key], mean_window(len(steps)))[chosen]
        for key, label in chart.series.items()
        if key in metrics
    }
    return {
        "box": [position.x0, position.x1],
        "limits": list(axes.get_xlim()),
        "steps": steps[chosen].astype(int).tolist(),
        "means": {
            label: [float(f"{v:.5g}") if np.isfinite(v) else None for v in mean] for label, mean in means.items()
        },
    }


def epoch_starts(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first step of every epoch but the first one."""
    epochs = metrics.get("epoch", np.zeros(0))
    changes = np.flatnonzero(np.diff(epochs) > 0) + 1
    return metrics["step"][changes]


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG in the light colours."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: colours as CSS variables, ids that begin with `name`."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    for variable, color in INK.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def error_grid(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What became of each cell: RIGHT, WRONG, MISSING (not reached by the prediction) or EXTRA (outside the target)."""
    height, width = np.maximum(predicted.shape, target.shape)
    h, w = np.minimum(predicted.shape, target.shape)
    # where neither grid reaches, in an L-shaped corner, there is nothing to be right or wrong about
    codes = np.full((height, width), RIGHT, np.uint8)
    codes[: predicted.shape[0], : predicted.shape[1]] = EXTRA
    codes[: target.shape[0], : target.shape[1]] = MISSING
    codes[:h, :w] = np.where(predicted[:h, :w] == target[:h, :w], RIGHT, WRONG)
    return codes


def grid_uri(grid: np.ndarray, colors: np.ndarray = ARC_COLORS) -> str:
    """A grid as a data URI of a PNG with one pixel per cell, to be enlarged by the page."""
    buffer = io.BytesIO()
    imsave(buffer, colors[grid], format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_grids(title: str, grids: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """Captioned grids side by side, each given with its colour table, with cells of one size."""
    gap = 0.12 * max(max(grid.shape) for _, grid, _ in grids)
    tallest = max(grid.shape[0] for _, grid, _ in grids)
    slots = [max(grid.shape[1], 4 * gap) + gap for _, grid, _ in grids]
    with matplotlib.rc_context(_RC):
        # one inch to eight gaps; a slot is never narrower than its caption
        figure = Figure(figsize=(sum(slots) / (8 * gap), (tallest + 5 * gap) / (8 * gap)))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, sum(slots)), ylim=(tallest + 2 * gap, -3 * gap))
        axes.set_axis_off()
        axes.text(gap / 2, -2 * gap, title, fontsize=9, va="center", parse_math=False)
        left = gap / 2
        for (caption, grid, colors), slot in zip(grids, slots, strict=True):
            h, w = grid.shape
            # from the bottom line up, as on the page
            axes.imshow(colors[grid], interpolation="nearest", extent=(left, left + w, tallest, tallest - h), zorder=1)
            axes.text(left, tallest + gap, f"{caption} {h}x{w}", fontsize=6.5, va="center", color=INK["muted"])
            left += slot
        axes.set(xlim=(0, sum(slots)), ylim=(tallest + 2 * gap, -3 * gap))
    return figure
