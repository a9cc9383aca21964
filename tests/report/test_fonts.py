"""Names of tasks in any script: drawn where a font has the letters, spelt out where none has."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from qwen_fused.report import fonts
from qwen_fused.report.curves import to_png
from qwen_fused.report.draw_grids import ARC_COLORS, draw_grids


@pytest.fixture
def only_latin(monkeypatch):
    monkeypatch.setattr(fonts, "WIDE", ())
    for cached in (fonts.families, fonts.drawable):
        cached.cache_clear()
    yield
    for cached in (fonts.families, fonts.drawable):
        cached.cache_clear()


def test_what_no_font_has_is_spelt_out(only_latin):
    assert fonts.drawable("größe · 日本 x") == "größe · U+65E5U+672C x"
    assert fonts.drawable("nul\0\n$x$") == "nulU+0000U+000A$x$"


@pytest.mark.parametrize("name", ["日本", "한국어", "größe", "nul\0x", "\U0001f600"])
def test_a_picture_of_any_name_draws_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_png(draw_grids(name, [("input", np.zeros((2, 2), np.uint8), ARC_COLORS)]))
