"""Grids keep every cell's colour, and errors are what they are called."""

from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_fused.report import curves, draw_grids
from qwen_fused.report.draw_grids import ARC_COLORS, ERROR_COLORS, EXTRA, MISSING, RIGHT, WRONG, error_grid


def cells(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def pixels(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == "data:image/png;base64"
    return (matplotlib.image.imread(io.BytesIO(base64.b64decode(content))) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 7)])
def test_grid_uri_has_one_pixel_per_cell(shape):
    grid = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    image = pixels(draw_grids.grid_uri(grid))
    assert image.shape[:2] == shape
    assert (image[..., :3] == ARC_COLORS[grid]).all() and (image[..., 3:] == 255).all()


def test_error_uri_keeps_its_alpha():
    codes = np.array([[RIGHT, WRONG], [MISSING, EXTRA]], np.uint8)
    assert (pixels(draw_grids.grid_uri(codes, ERROR_COLORS)) == ERROR_COLORS[codes]).all()


def test_error_grid_by_hand():
    assert error_grid(cells("12"), cells("13")).tolist() == [[RIGHT, WRONG]]
    assert error_grid(cells("1"), cells("12", "34")).tolist() == [[RIGHT, MISSING], [MISSING, MISSING]]
    assert error_grid(cells("12", "34"), cells("2")).tolist() == [[WRONG, EXTRA], [EXTRA, EXTRA]]
    # a wide prediction of a high target: the corner that neither reaches is nobody's error
    assert error_grid(cells("123"), cells("1", "4")).tolist() == [[RIGHT, EXTRA, EXTRA], [MISSING, RIGHT, RIGHT]]


@given(st.tuples(*[st.integers(1, 30)] * 4), st.integers(0, 1000))
def test_error_grid_counts_every_cell_once(sides, seed):
    rng = np.random.default_rng(seed)
    predicted, target = (rng.integers(0, 3, sides[i : i + 2]) for i in (0, 2))
    codes = error_grid(predicted, target)
    overlap = np.minimum(predicted.shape, target.shape).prod()
    assert (codes == MISSING).sum() == target.size - overlap
    assert (codes == EXTRA).sum() == predicted.size - overlap
    h, w = np.minimum(predicted.shape, target.shape)
    assert (codes == WRONG).sum() == (predicted[:h, :w] != target[:h, :w]).sum()
    assert (codes != RIGHT).any() == (predicted.shape != target.shape or (predicted != target).any())


def test_grids_are_drawn_to_one_scale():
    row = [("a", cells("12"), ARC_COLORS), ("b", np.zeros((30, 20), np.uint8), ARC_COLORS)]
    figure = draw_grids.draw_grids("no $formula^{ is$ meant", row)
    (axes,) = figure.axes
    for image, (_, grid, _) in zip(axes.get_images(), row, strict=True):
        left, right, bottom, top = image.get_extent()
        assert (abs(bottom - top), abs(right - left)) == pytest.approx(grid.shape)
    # a unit is as long across as down
    width, height = figure.get_size_inches()
    across, down = (abs(np.subtract(*limits)) for limits in (axes.get_xlim(), axes.get_ylim()))
    assert width / across == pytest.approx(height / down)
    assert curves.to_png(figure, dpi=50)[:4] == b"\x89PNG"


def test_rows_of_grids_keep_their_proportions():
    rows = [("a", [("x", np.zeros((3, 3), np.uint8), ARC_COLORS)] * 4), ("b", [("y", cells("12"), ARC_COLORS)])]
    figure = draw_grids.draw_rows(rows, width=5)
    width, height = figure.get_size_inches()
    assert width == pytest.approx(5) and len(figure.axes) == 2
    for axes in figure.axes:
        across, down = (abs(np.subtract(*limits)) for limits in (axes.get_xlim(), axes.get_ylim()))
        box = axes.get_position()
        assert box.width * width / across == pytest.approx(box.height * height / down)
    assert figure.axes[0].get_position().y0 == pytest.approx(figure.axes[1].get_position().y1)
    image = curves.to_pixels(figure, dpi=40)
    assert image.dtype == np.uint8 and image.shape == (int(height * 40), 200, 3)
