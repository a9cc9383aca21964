"""Fifteen numbers that describe a demonstration pair, and the class of transformation they point to.

Everything here reads demonstrations only: an input and an output grid that the task itself shows. Nothing
reads the query's answer. The numbers, their order and the classes' thresholds are those of the original recipe.
"""

from __future__ import annotations

import numpy as np

FEATURES: tuple[str, ...] = (
    "area_ratio",
    "size_preserved",
    "changed",
    "color_preservation",
    "correlation",
    "symmetry_change",
    "density_change",
    "colors_added",
    "colors_removed",
    "colors_in",
    "colors_out",
    "height_in",
    "height_out",
    "width_in",
    "width_out",
)

# means over the demonstrations, in the order of `SizeHead`
SIZE_FEATURES = ("height_in", "width_in", "height_out", "width_out")

RULES: dict[str, str] = {
    "shrinking": "The output is a smaller grid that keeps or sums up a part of the input.",
    "expanding": "The output is a larger grid that repeats, scales or extends the input.",
    "reshaping": "The output has as many cells as the input, in another height and width.",
    "size_transformation": "The output has another size than the input, though a similar area.",
    "copy_or_minimal": "The output copies the input and changes very few cells.",
    "recoloring": "The output keeps the shapes and replaces colours of the input by others.",
    "color_addition": "The output adds colours that the input does not have.",
    "color_removal": "The output removes colours that the input has.",
    "symmetry_operation": "The output changes the mirror symmetry of the input.",
    "spatial_shift": "The output moves the parts of the input to other places.",
    "pattern_completion": "The output completes the pattern of the input and fills empty cells.",
    "pattern_removal": "The output erases a large part of the pattern of the input.",
    "reconstruction": "The output is built anew and resembles the input little.",
    "filtering": "The output keeps some objects of the input and erases the others.",
    "pattern_transformation": "The output transforms the pattern of the input at the same size.",
    "general_transformation": "The output follows from the input by a rule of its own.",
}


def _background_share(grid: np.ndarray) -> float:
    return np.bincount(grid.ravel()).max() / grid.size


def _mirror_symmetries(grid: np.ndarray) -> int:
    return int(np.array_equal(grid, grid[:, ::-1])) + int(np.array_equal(grid, grid[::-1]))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return 0.0
    x, y = a.ravel() - a.mean(), b.ravel() - b.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def pair_features(input: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The fifteen features of one demonstration pair, in the order of `FEATURES`.

    Args:
        input: [h, w] integer grid of colours, never empty.
        output: [h', w'] integer grid of colours, never empty.

    Returns:
        [15] float32: ratios and shares as fractions, colours as counts, heights and widths in cells.
    """
    same_size = input.shape == output.shape
    colors_in, colors_out = set(input.ravel().tolist()), set(output.ravel().tolist())
    return np.array(
        [
            output.size / input.size,
            float(same_size),
            float((input != output).mean()) if same_size else 1.0,
            len(colors_in & colors_out) / len(colors_in | colors_out),
            _correlation(input, output),
            abs(_mirror_symmetries(input) - _mirror_symmetries(output)),
            _background_share(input) - _background_share(output),
            len(colors_out - colors_in),
            len(colors_in - colors_out),
            len(colors_in),
            len(colors_out),
            input.shape[0],
            output.shape[0],
            input.shape[1],
            output.shape[1],
        ],
        dtype=np.float32,
    )


def classify(features: np.ndarray) -> str:
    """The transformation class of a pair's or a task's features: the first of the sixteen that matches.

    Args:
        features: [15] as `pair_features` gives them, or their mean over a task's pairs. In a mean, sizes
            count as preserved where every pair preserves them.

    Returns:
        A key of `RULES`.
    """
    if len(features) != len(FEATURES):
        raise ValueError(f"features must be [{len(FEATURES)}], got {tuple(np.shape(features))}")
    area, size_preserved, changed, kept, correlation, symmetry, density, added, removed = map(float, features[:9])
    # features are float32 means: equality with 1 up to their rounding
    eps = 1e-5
    ladder = (
        (area < 0.9, "shrinking"),
        (area > 1.1, "expanding"),
        (size_preserved < 1 - eps and abs(area - 1) < eps, "reshaping"),
        (size_preserved < 1 - eps, "size_transformation"),
        (changed < 0.05, "copy_or_minimal"),
        (kept < 0.3 and added > 0 and removed > 0, "recoloring"),
        (kept < 0.3 and added > 0, "color_addition"),
        (kept < 0.3 and removed > 0, "color_removal"),
        (symmetry > 0.5, "symmetry_operation"),
        (changed > 0.5 and correlation > 0.5, "spatial_shift"),
        (density > 0.2, "pattern_completion"),
        (density < -0.2, "pattern_removal"),
        (correlation < 0.3 and changed > 0.5, "reconstruction"),
        (changed > 0.3 and density < -0.1, "filtering"),
        (0.2 < changed < 0.8, "pattern_transformation"),
    )
    return next((name for matches, name in ladder if matches), "general_transformation")


def rule_sentence(features: np.ndarray) -> str:
    """One sentence, at most 25 words, that names the rule a task seems to follow: the prompt's text opens with it."""
    return RULES[classify(features)]


def normalise(features: np.ndarray) -> np.ndarray:
    """Features scaled to O(1) for a network: log of the area ratio, colours per ten, sides per thirty cells.

    Args:
        features: [..., 15] float32.

    Returns:
        [..., 15] float32, a new array.
    """
    scaled = np.array(features, dtype=np.float32)
    scaled[..., 0] = np.log(scaled[..., 0])
    scaled[..., 7:11] /= 10
    scaled[..., 11:15] /= 30
    return scaled
