"""Features, classes and rules of demonstration pairs: hand-computed values, each class, nothing but demonstrations."""

import numpy as np
import pytest
from demonstrations import mean_features
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused.arc.episodes import Pair
from qwen_fused.arc.features import (
    FEATURES,
    RULES,
    classify,
    normalise,
    pair_features,
    rule_sentence,
)


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], dtype=np.uint8)


def features(**changes: float) -> np.ndarray:
    """Features of a task that no class but the last matches, with `changes`."""
    plain = dict(area_ratio=1, size_preserved=1, changed=0.9, color_preservation=1, correlation=0.4)
    return np.array([{**plain, **changes}.get(name, 0) for name in FEATURES], dtype=np.float32)


def test_hand_values_same_size():
    got = dict(zip(FEATURES, pair_features(grid("012", "000"), grid("013", "330")), strict=True))
    want = dict(
        area_ratio=1,
        size_preserved=1,
        changed=3 / 6,
        color_preservation=2 / 4,
        symmetry_change=0,
        # commonest colour: 0 in four cells of six before, 3 in three of six after
        density_change=(1 - 3 / 6) - (1 - 4 / 6),
        correlation=np.corrcoef([0, 1, 2, 0, 0, 0], [0, 1, 3, 3, 3, 0])[0, 1],
        colors_added=1,
        colors_removed=1,
        colors_in=3,
        colors_out=3,
        height_in=2,
        height_out=2,
        width_in=3,
        width_out=3,
    )
    assert list(got) == list(FEATURES) and len(FEATURES) == 15
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name


def test_hand_values_other_size():
    got = dict(zip(FEATURES, pair_features(grid("11", "11"), grid("1234")), strict=True))
    assert got["area_ratio"] == 1 and got["size_preserved"] == 0 and got["changed"] == 1
    assert got["correlation"] == 0
    # the input mirrors both ways, the output only top-bottom: a single row is its own mirror image
    assert got["symmetry_change"] == 1
    assert pair_features(grid("1234"), grid("11", "11"))[FEATURES.index("symmetry_change")] == 1
    assert (got["height_in"], got["height_out"], got["width_in"], got["width_out"]) == (2, 1, 2, 4)
    assert (got["colors_added"], got["colors_removed"]) == (3, 0)


def test_correlation_of_constant_grids_is_zero():
    assert pair_features(grid("11"), grid("12"))[FEATURES.index("correlation")] == 0
    # uint8 arithmetic would wrap: the mean must be subtracted as a float
    assert pair_features(grid("09"), grid("90"))[FEATURES.index("correlation")] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shrinking", dict(area_ratio=0.89, size_preserved=0)),
        ("expanding", dict(area_ratio=1.11, size_preserved=0)),
        ("reshaping", dict(size_preserved=0)),
        ("size_transformation", dict(size_preserved=0, area_ratio=1.05)),
        ("copy_or_minimal", dict(changed=0.04, color_preservation=0.1, colors_added=1)),
        ("recoloring", dict(color_preservation=0.2, colors_added=1, colors_removed=1)),
        ("color_addition", dict(color_preservation=0.2, colors_added=1)),
        ("color_removal", dict(color_preservation=0.2, colors_removed=1)),
        ("symmetry_operation", dict(symmetry_change=1, correlation=0.6)),
        ("spatial_shift", dict(changed=0.6, correlation=0.6, density_change=0.3)),
        ("pattern_completion", dict(density_change=0.3, correlation=0)),
        ("pattern_removal", dict(density_change=-0.3, correlation=0)),
        ("reconstruction", dict(correlation=0.2, density_change=-0.15)),
        ("filtering", dict(changed=0.4, density_change=-0.15)),
        ("pattern_transformation", dict(changed=0.5)),
        ("general_transformation", dict(changed=0.9)),
        ("general_transformation", dict(changed=0.1)),
    ],
)
def test_first_matching_class_wins(name, changes):
    assert classify(features(**changes)) == name


def test_one_resizing_pair_makes_the_task_resizing():
    same, other = Pair(grid("12", "21"), grid("12", "22")), Pair(grid("12", "21"), grid("1221"))
    assert classify(mean_features([same, other])) == "reshaping"
    assert classify(mean_features([same] * 3)) != "reshaping"


def test_rules_are_short_sentences():
    assert len(RULES) == 16 and len(set(RULES.values())) == 16
    for sentence in RULES.values():
        assert len(sentence.split()) <= 25 and sentence.endswith(".") and "\n" not in sentence
    assert rule_sentence(features(changed=0.01)) == RULES["copy_or_minimal"]


def test_rejects_features_of_another_length():
    with pytest.raises(ValueError, match=r"\[15\], got \(14,\)"):
        classify(np.zeros(14))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), *[st.integers(1, 30)] * 4, st.integers(1, 10))
def test_any_pair_has_finite_features_of_order_one(seed, h, w, h2, w2, colors):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, colors, (h, w), np.uint8), rng.integers(0, colors, (h2, w2), np.uint8)
    raw = pair_features(before, after)
    kept = raw.copy()
    scaled = normalise(raw)
    assert raw.shape == (15,) and raw.dtype == np.float32 and scaled.dtype == np.float32
    assert np.isfinite(scaled).all() and np.abs(scaled).max() < 7
    assert np.array_equal(raw, kept)
    assert classify(raw) in RULES
