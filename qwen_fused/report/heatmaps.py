"""Pictures of a run that are no curves: Qwen's gradient by layer and time, predicted sizes, every held-out task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwen_fused.report.curves import INK, STYLE

# columns that a page can show; longer runs are averaged into so many
MAX_COLUMNS = 480


def gradient_matrix(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Rows of gradients.jsonl as a picture's content.

    Returns:
        The layers, first to last and then what is in none; the step of each column; and the norms [layers, columns],
        0 where a gradient was exactly 0 and NaN where there is no number. A column of a long run is the geometric
        mean of the steps from its own to the next one's.
    """
    names = {name: None for row in rows for name in row["norms"]}
    layers = sorted(names, key=lambda name: (not name.startswith("layer "), _number(name), name))
    steps = np.array([row["step"] for row in rows])
    norms = np.array([[row["norms"].get(name, np.nan) for row in rows] for name in layers], dtype=np.float64)
    if len(steps) > MAX_COLUMNS:
        starts = np.linspace(0, len(steps), MAX_COLUMNS, endpoint=False).astype(int)
        parts = np.split(norms, starts[1:], axis=1)
        norms, steps = np.stack([_geometric_mean(part) for part in parts], 1), steps[starts]
    return layers, steps, norms


def draw_gradients(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The gradient's norm of every layer of Qwen over time; None without any norm above 0."""
    if not _drawable(rows):
        return None
    layers = len({name for row in rows for name in row["norms"]})
    with matplotlib.rc_context(STYLE):
        height = 1.0 + 0.24 * max(layers, 4)
        figure = Figure(figsize=(11.6, height))
        axes = figure.add_axes((0.065, 0.55 / height, 0.84, 1 - 0.7 / height))
        plot_gradients(axes, rows)
        bar = figure.colorbar(axes.images[0], cax=figure.add_axes((0.92, 0.55 / height, 0.012, 1 - 0.7 / height)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="both", length=0)
    return figure


def plot_gradients(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same on axes of the caller's, which must have something to show."""
    layers, steps, norms = gradient_matrix(rows)
    positive = norms[np.isfinite(norms) & (norms > 0)]
    colors = matplotlib.colormaps["viridis"].with_extremes(under="#e34948", bad="#e34948")
    # the outermost hundredth of the norms would take the colours from all others
    low, high = np.quantile(positive, (0.01, 0.99))
    scale = LogNorm(low, max(high, 1.01 * low))
    shown = np.where(norms > 0, np.clip(norms, low, high), np.nan)
    axes.imshow(shown, cmap=colors, norm=scale, aspect="auto", interpolation="none", extent=_extent(steps, len(layers)))
    axes.set_yticks(range(len(layers)), [name.removeprefix("layer ") for name in layers])
    axes.set_ylabel("layer")
    axes.set_xlabel("batch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)


def draw_sizes(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Predicted against true heights and widths of first attempts; None where no record says its answer's size."""
    known = [record for record in records if record.get("answer_size")]
    if not known:
        return None
    true = np.array([record["answer_size"] for record in known])
    predicted = np.array([np.shape(record["attempts"][0]) for record in known])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.9))
        for side, (name, left) in enumerate((("height", 0.085), ("width", 0.585))):
            axes = figure.add_axes((left, 0.16, 0.4, 0.74))
            pairs, counts = np.unique(np.stack([true[:, side], predicted[:, side]], 1), axis=0, return_counts=True)
            right = pairs[:, 0] == pairs[:, 1]
            axes.plot([0, 31], [0, 31], color=INK["rule"], linewidth=0.8, zorder=0)
            for chosen, color in ((right, "series-2"), (~right, "series-3")):
                height_or_width, guess = pairs[chosen].T
                axes.scatter(height_or_width, guess, s=14 * counts[chosen], color=INK[color], alpha=0.75, linewidths=0)
            share = np.mean(true[:, side] == predicted[:, side])
            axes.set_title(f"{name}: {100 * share:.0f} % right", fontsize=9, loc="left", color=INK["ink"])
            axes.set(xlim=(0, 31), ylim=(0, 31), xlabel="true", ylabel="predicted" if side == 0 else "")
            axes.set_xticks([1, 10, 20, 30])
            axes.set_yticks([1, 10, 20, 30])
            axes.grid(color=INK["rule"], linewidth=0.4)
            axes.set_axisbelow(True)
            axes.tick_params(which="both", length=0)
    return figure


def task_means(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tasks with known answers, hardest first: cells right of the first attempts, the same of copying, sizes right."""
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("score"):
            tasks.setdefault(record["task_id"], []).append(record["score"])
    means = [
        {"task_id": name, **{key: float(np.mean([s[key] for s in scores])) for key in ("cells", "copy_cells", "size")}}
        | {"solved": all(s["any"] for s in scores)}
        for name, scores in tasks.items()
    ]
    return sorted(means, key=lambda task: (task["cells"], task["task_id"]))


def draw_tasks(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Every task by cells right, hardest first, beside what copying the input gets; None without a known answer."""
    tasks = task_means(records)
    if not tasks:
        return None
    place = np.arange(len(tasks))
    cells, copied = (np.array([task[key] for task in tasks]) for key in ("cells", "copy_cells"))
    solved = np.array([task["solved"] for task in tasks])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.9))
        axes = figure.add_axes((0.09, 0.16, 0.895, 0.74))
        axes.vlines(place, np.minimum(cells, copied), np.maximum(cells, copied), color=INK["rule"], linewidth=1.5)
        axes.scatter(place, copied, s=12, color=INK["muted"], alpha=0.6, linewidths=0, label="copying the input")
        axes.scatter(place, cells, s=20, color=INK["series-1"], linewidths=0, label="first attempt", zorder=3)
        if solved.any():
            ring = INK["series-2"]
            axes.scatter(
                place[solved], cells[solved], s=46, label="solved", facecolors="none", edgecolors=ring, zorder=4
            )
        axes.set(ylim=(-0.02, 1.04), xlabel="held-out tasks, hardest first")
        axes.set_xticks([])
        axes.margins(x=0.02)
        axes.grid(axis="y", color=INK["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, handlelength=1)
    return figure


def _drawable(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(norm > 0 and np.isfinite(norm) for row in rows for norm in row["norms"].values())


def _extent(steps: np.ndarray, layers: int) -> tuple[float, float, float, float]:
    """Half a column beyond the outer steps; the first layer at the bottom would be upside down, so it is on top."""
    half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
    return steps[0] - half, steps[-1] + half, layers - 0.5, -0.5


def _geometric_mean(part: np.ndarray) -> np.ndarray:
    """Geometric mean of the positive norms of each layer; 0 where there is none, NaN where a number is missing."""
    positive = part > 0
    logs = np.where(positive, np.log(np.where(positive, part, 1.0)), 0.0).sum(1) / np.maximum(positive.sum(1), 1)
    mean = np.where(positive.any(1), np.exp(logs), 0.0)
    return np.where(np.isfinite(part).all(1), mean, np.nan)


def _number(name: str) -> int:
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 0
