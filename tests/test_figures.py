"""Grids keep every cell's colour, errors are what they are called, and curves show what was measured."""

from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused import figures
from qwen_fused.figures import ARC_COLORS, ERROR_COLORS, EXTRA, MISSING, RIGHT, WRONG, Chart, error_grid, running_mean


def cells(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def pixels(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == "data:image/png;base64"
    return (matplotlib.image.imread(io.BytesIO(base64.b64decode(content))) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 7)])
def test_grid_uri_has_one_pixel_per_cell(shape):
    grid = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    image = pixels(figures.grid_uri(grid))
    assert image.shape[:2] == shape
    assert (image[..., :3] == ARC_COLORS[grid]).all() and (image[..., 3:] == 255).all()


def test_error_uri_keeps_its_alpha():
    codes = np.array([[RIGHT, WRONG], [MISSING, EXTRA]], np.uint8)
    assert (pixels(figures.grid_uri(codes, ERROR_COLORS)) == ERROR_COLORS[codes]).all()


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


@settings(max_examples=200)
@given(st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=40), st.integers(1, 12))
def test_running_mean_is_the_mean_of_its_window(values, window):
    values = np.array(values)
    means = running_mean(values, window)
    assert means.shape == values.shape
    for i, mean in enumerate(means):
        around = values[max(0, i - window // 2) : i - window // 2 + window]
        known = around[np.isfinite(around)]
        assert np.isnan(mean) if not len(known) else mean == pytest.approx(known.mean(), abs=1e-6)


def drawn(figure) -> list[np.ndarray]:
    """The y values of each pair of lines: raw and mean of every series."""
    return [line.get_ydata() for line in figure.axes[0].get_lines()]


def test_chart_draws_values_and_their_mean():
    metrics = {"step": np.arange(1.0, 101), "loss": np.linspace(5, 4, 100), "epoch": np.repeat([0.0, 1.0], 50)}
    figure = figures.draw_chart(Chart("loss", "Loss", {"loss": "loss"}), metrics)
    raw, mean, dashed = drawn(figure)
    np.testing.assert_array_equal(raw, metrics["loss"])
    np.testing.assert_array_equal(mean, running_mean(metrics["loss"], 10))
    # the one dashed line stands where epoch 1 begins
    assert list(figure.axes[0].get_lines()[2].get_xdata()) == [51, 51] and len(dashed) == 2
    assert figure.axes[0].get_legend() is None


def test_log_chart_leaves_out_zeros():
    metrics = {"step": np.arange(1.0, 4), "qwen_grad": np.array([0.0, 1e-5, 1e-3])}
    figure = figures.draw_chart(Chart("g", "g", {"qwen_grad": "Qwen"}, log=True), metrics)
    assert figure.axes[0].get_yscale() == "log"
    np.testing.assert_array_equal(drawn(figure)[0], [np.nan, 1e-5, 1e-3])


def test_chart_of_nothing_is_none():
    steps = np.arange(3.0)
    chart = Chart("c", "c", {"a": "a", "b": "b"})
    assert figures.draw_chart(chart, {"step": steps}) is None
    assert figures.draw_chart(chart, {"step": steps, "a": np.full(3, np.nan)}) is None
    assert figures.draw_chart(chart, {"step": np.zeros(0), "a": np.zeros(0)}) is None
    # of two series one is there
    figure = figures.draw_chart(chart, {"step": steps, "b": steps})
    assert len(drawn(figure)) == 2


def test_readings_match_the_drawing():
    steps = np.arange(1.0, 1001)
    metrics = {"step": steps, "loss": 5 - steps / 1000}
    chart = Chart("loss", "Loss", {"loss": "loss"})
    figure = figures.draw_chart(chart, metrics)
    read = figures.readings(figure, chart, metrics)
    assert len(read["steps"]) == len(read["means"]["loss"]) == 400
    assert (read["steps"][0], read["steps"][-1]) == (1, 1000)
    mean = dict(zip(steps, running_mean(metrics["loss"], 50), strict=True))
    assert all(abs(mean[s] - v) < 1e-3 for s, v in zip(read["steps"], read["means"]["loss"], strict=True))
    assert read["limits"][0] < 1 and read["limits"][1] > 1000
    assert 0 < read["box"][0] < read["box"][1] < 1


def test_grids_are_drawn_to_one_scale():
    grids = [("a", cells("12"), ARC_COLORS), ("b", np.zeros((30, 20), np.uint8), ARC_COLORS)]
    figure = figures.draw_grids("no $formula^{ is$ meant", grids)
    (axes,) = figure.axes
    for image, (_, grid, _) in zip(axes.get_images(), grids, strict=True):
        left, right, bottom, top = image.get_extent()
        assert (abs(bottom - top), abs(right - left)) == pytest.approx(grid.shape)
    # a unit is as long across as down
    width, height = figure.get_size_inches()
    across, down = (abs(np.subtract(*limits)) for limits in (axes.get_xlim(), axes.get_ylim()))
    assert width / across == pytest.approx(height / down)
    assert figures.to_png(figure, dpi=50)[:4] == b"\x89PNG"
