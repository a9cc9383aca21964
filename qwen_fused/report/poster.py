"""One picture of a whole run, as the README shows it: loss, Qwen's gradient in all and by layer, answers over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_fused.report.answers import Example, read_examples
from qwen_fused.report.curves import CHARTS, INK, STYLE, plot_chart
from qwen_fused.report.draw_grids import Layout, plot_grids
from qwen_fused.report.heatmaps import plot_gradients
from qwen_fused.report.run_files import read_file, read_gradients, read_metrics

WIDTH = 11.0  # inches
# of the best-answered held-out episodes
EXAMPLES = 3


def draw_poster(run: Path) -> Figure:
    """The picture of a run folder that has been trained and evaluated.

    Args:
        run: the run folder.

    Raises:
        ValueError: the run has no metrics, gradients or examples yet.
    """
    metrics, gradients = read_metrics(run / "metrics.jsonl"), read_gradients(run / "gradients.jsonl")
    shown = read_examples(read_file(run / "examples.json", []), str(run / "examples.json"))[:EXAMPLES]
    parts = {"metrics.jsonl": len(metrics["step"]), "gradients.jsonl": gradients, "examples.json": shown}
    missing = [name for name, content in parts.items() if not content]
    if missing:
        raise ValueError(f"run must be a finished run to draw a picture of, got {run} with nothing in {missing[0]}")
    return _draw(metrics, gradients, shown)


def _draw(
    metrics: Mapping[str, np.ndarray], gradients: Sequence[Mapping[str, Any]], shown: Sequence[Example]
) -> Figure:
    layouts = [Layout(example.row) for example in shown]
    rows = [WIDTH * layout.height / layout.width for layout in layouts]
    height = 5.0 + sum(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def panel(left: float, top: float, width: float, tall: float, title: str) -> Axes:
            axes = figure.add_axes((left, 1 - (top + tall) / height, width, tall / height))
            axes.set_title(title, loc="left", fontsize=10, color=INK["ink"])
            return axes

        charts = {chart.name: chart for chart in CHARTS}
        plot_chart(panel(0.05, 0.35, 0.44, 1.75, "Loss"), charts["loss"], metrics)
        plot_chart(panel(0.55, 0.35, 0.44, 1.75, "Gradient that reaches Qwen, L2 norm"), charts["qwen-grad"], metrics)
        plot_gradients(panel(0.07, 2.85, 0.92, 1.45, "The same by layer: brighter is larger"), gradients)
        top = 5.0
        for example, tall in zip(shown, rows, strict=True):
            axes = figure.add_axes((0, 1 - (top + tall) / height, 1, tall / height))
            plot_grids(axes, f"held-out task {example.task_id}: {example.verdict}", example.row)
            top += tall
    return figure
