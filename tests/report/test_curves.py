"""Curves show what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused.report import curves
from qwen_fused.report.curves import Chart, running_mean


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
    figure = curves.draw_chart(Chart("loss", "Loss", {"loss": "loss"}), metrics)
    raw, mean, dashed = drawn(figure)
    np.testing.assert_array_equal(raw, metrics["loss"])
    np.testing.assert_array_equal(mean, running_mean(metrics["loss"], 10))
    # the one dashed line stands where epoch 1 begins
    assert list(figure.axes[0].get_lines()[2].get_xdata()) == [51, 51] and len(dashed) == 2
    assert figure.axes[0].get_legend() is None


def test_log_chart_leaves_out_zeros():
    metrics = {"step": np.arange(1.0, 4), "qwen_grad": np.array([0.0, 1e-5, 1e-3])}
    figure = curves.draw_chart(Chart("g", "g", {"qwen_grad": "Qwen"}, log=True), metrics)
    assert figure.axes[0].get_yscale() == "log"
    np.testing.assert_array_equal(drawn(figure)[0], [np.nan, 1e-5, 1e-3])


@pytest.mark.parametrize("low, high", [(0.36, 3.2), (2.1e-5, 2.4e-5), (0.32, 0.35), (1e-7, 1e2), (3e3, 4e5)])
def test_log_ticks_have_room_in_the_margin(low, high):
    metrics = {"step": np.arange(1.0, 4), "qwen_grad": np.array([low, high, low])}
    figure = curves.draw_chart(Chart("g", "g", {"qwen_grad": "Qwen"}, log=True), metrics)
    figure.canvas.draw()
    (axes,) = figure.axes
    ticks = [t for minor in (False, True) for t in axes.get_yticklabels(minor=minor) if t.get_text()]
    shown = [t for t in ticks if axes.get_ylim()[0] <= t.get_position()[1] <= axes.get_ylim()[1]]
    assert len(shown) >= 2 and min(t.get_window_extent().x0 for t in shown) >= 0
    # no two of them say the same
    assert len({t.get_text() for t in shown}) == len(shown)


def test_chart_of_nothing_is_none():
    steps = np.arange(3.0)
    chart = Chart("c", "c", {"a": "a", "b": "b"})
    assert curves.draw_chart(chart, {"step": steps}) is None
    assert curves.draw_chart(chart, {"step": steps, "a": np.full(3, np.nan)}) is None
    assert curves.draw_chart(chart, {"step": np.zeros(0), "a": np.zeros(0)}) is None
    # of two series one is there
    figure = curves.draw_chart(chart, {"step": steps, "b": steps})
    assert len(drawn(figure)) == 2


def test_readings_match_the_drawing():
    steps = np.arange(1.0, 1001)
    metrics = {"step": steps, "loss": 5 - steps / 1000}
    chart = Chart("loss", "Loss", {"loss": "loss"})
    figure = curves.draw_chart(chart, metrics)
    read = curves.hover_data(figure, chart, metrics)
    assert len(read["steps"]) == len(read["means"]["loss"]) == 400
    assert (read["steps"][0], read["steps"][-1]) == (1, 1000)
    mean = dict(zip(steps, running_mean(metrics["loss"], 50), strict=True))
    assert all(abs(mean[s] - v) < 1e-3 for s, v in zip(read["steps"], read["means"]["loss"], strict=True))
    assert read["limits"][0] < 1 and read["limits"][1] > 1000
    assert 0 < read["box"][0] < read["box"][1] < 1


def test_a_short_run_has_batches_in_whole_numbers():
    figure = curves.draw_chart(curves.CHARTS[0], {"step": np.array([1.0, 2, 3]), "loss": np.array([3.0, 2, 1])})
    (axes,) = figure.axes
    ticks = axes.get_xticks()
    assert len(ticks) and (ticks == ticks.round()).all()
