"""Curves of a run as matplotlib figures, and how a figure goes on a page and into a PNG.

A curve is drawn once and saved twice. In the PNG its colours are as written here; in the SVG each becomes a CSS
variable, so that one picture is right on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogFormatter, MaxNLocator

from qwen_fused.report.fonts import families

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

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qwen-fused",
    "font.family": families(),
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


class ShortLog(LogFormatter):
    """Ticks of a log axis as numbers that the margin has room for; those inside a decade where few decades show."""

    def __call__(self, value: float, place: int | None = None) -> str:
        return f"{value:.3g}".replace("e-0", "e-") if super().__call__(value, place) else ""


def draw_chart(chart: Chart, metrics: Mapping[str, np.ndarray]) -> Figure | None:
    """The chart of a run's metrics, raw values faint under their running mean; None without any value to show."""
    count = len(_shown(chart, metrics))
    if not count:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.7))
        # room for the legend where there is one
        plot_chart(figure.add_axes((0.1, 0.16, 0.885, 0.74 if count > 1 else 0.81)), chart, metrics)
    return figure


def plot_chart(axes: Axes, chart: Chart, metrics: Mapping[str, np.ndarray]) -> None:
    """The chart on axes of the caller's."""
    shown, steps = _shown(chart, metrics), metrics["step"]
    window = mean_window(len(steps))
    axes.margins(x=0.01)
    for color, (key, label) in zip(("series-1", "series-2", "series-3"), shown.items(), strict=False):
        values = np.where(metrics[key] > 0, metrics[key], np.nan) if chart.log else metrics[key]
        few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < 3 else {}
        axes.plot(steps, values, color=INK[color], linewidth=0.8, alpha=0.3, **few)
        axes.plot(steps, running_mean(values, window), color=INK[color], linewidth=1.8, label=label, **few)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ShortLog())
        axes.yaxis.set_minor_formatter(ShortLog())
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(shown) > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, handlelength=1.2
        )


def _shown(chart: Chart, metrics: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The series that have a value to show."""
    return {key: label for key, label in chart.series.items() if np.isfinite(metrics.get(key, np.nan)).any()}


def hover_data(figure: Figure, chart: Chart, metrics: Mapping[str, np.ndarray]) -> dict:
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
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_pixels(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as an image [h, w, 3] uint8 in the light colours."""
    return (imread(io.BytesIO(to_png(figure, dpi)))[..., :3] * 255).round().astype(np.uint8)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: colours as CSS variables, ids that begin with `name`."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
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
