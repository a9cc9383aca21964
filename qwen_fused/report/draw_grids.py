"""Grids as pictures: one-pixel-per-cell PNGs in the ARC colours for a page, rows of captioned grids as figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from qwen_fused.report.curves import INK, STYLE
from qwen_fused.report.fonts import drawable

# a caption, a grid, and the table its numbers are colours of
CaptionedGrid = tuple[str, np.ndarray, np.ndarray]

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


def draw_grids(title: str, row: Sequence[CaptionedGrid]) -> Figure:
    """Captioned grids side by side, with cells of one size."""
    return draw_rows([(title, row)])


def draw_rows(rows: Sequence[tuple[str, Sequence[CaptionedGrid]]], width: float | None = None) -> Figure:
    """Titled rows of captioned grids, one below the other, each with cells of one size.

    Args:
        rows: the title and the grids of each row, at least one.
        width: inches of the figure; without it an eighth of the longest row's largest side is an inch.
    """
    layouts = [Layout(row) for _, row in rows]
    across = max(layout.width / layout.gap for layout in layouts)
    down = sum(layout.height / layout.gap for layout in layouts)
    # one inch to eight gaps
    scale = width / across if width else 1 / 8
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(across * scale, down * scale))
        top = 1.0
        for (title, row), layout in zip(rows, layouts, strict=True):
            share = layout.height / layout.gap / down
            axes = figure.add_axes((0, top - share, layout.width / layout.gap / across, share))
            plot_grids(axes, title, row)
            top -= share
    return figure


def plot_grids(axes: Axes, title: str, row: Sequence[CaptionedGrid]) -> None:
    """Captioned grids side by side on axes of the row's proportions."""
    layout = Layout(row)
    gap, tallest = layout.gap, layout.tallest
    axes.set_axis_off()
    axes.text(gap / 2, -2 * gap, drawable(title), fontsize=9, va="center", parse_math=False)
    left = gap / 2
    for (caption, grid, colors), slot in zip(row, layout.slots, strict=True):
        h, w = grid.shape
        # from the bottom line up, as on the page
        axes.imshow(colors[grid], interpolation="nearest", extent=(left, left + w, tallest, tallest - h), zorder=1)
        axes.text(left, tallest + gap, f"{caption} {h}x{w}", fontsize=6.5, va="center", color=INK["muted"])
        left += slot
    axes.set(xlim=(0, layout.width), ylim=(tallest + 2 * gap, -3 * gap))


class Layout:
    """Measures of a row of grids, in cells; a slot is never narrower than its caption."""

    def __init__(self, row: Sequence[CaptionedGrid]):
        self.gap = 0.12 * max(max(grid.shape) for _, grid, _ in row)
        self.tallest = max(grid.shape[0] for _, grid, _ in row)
        self.slots = [max(grid.shape[1], 4 * self.gap) + self.gap for _, grid, _ in row]
        self.width, self.height = sum(self.slots), self.tallest + 5 * self.gap
