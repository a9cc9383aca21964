"""The layer that a parameter belongs to, by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, else all but its last part."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[: max(1, len(parts) - 1)])


def group_by_layer(names: Iterable[str], most: int = 64) -> dict[str, list[str]]:
    """Layer -> its parameters' names; joined by their first part when there are more than `most` layers."""
    names = list(names)
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    if len(layers) <= most:
        return layers
    counted = Counter(layer.split(".")[0] for layer in layers)
    return {top: [name for name in names if name.split(".")[0] == top] for top in counted}


def numbered_layers(members: Sequence[tuple[str, nn.Parameter]]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters of a transformer: "layer 0" .. "layer n - 1", and "other" (embedding, last norm)."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in members:
        number = re.search(r"\blayers\.(\d+)$", layer_of(name))
        layers.setdefault(f"layer {number[1]}" if number else "other", []).append((name, parameter))
    return layers
