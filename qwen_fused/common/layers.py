"""The layer that a parameter belongs to, told by its name."""

from __future__ import annotations

from collections.abc import Iterable

# what belongs to no numbered layer: an embedding, the last norm, a head
OTHER = "other"


def layer_of(name: str) -> str:
    """A parameter's layer: its name up to the first number, else all but the last part.

    "model.layers.3.mlp.weight" is of "model.layers.3", "norm.weight" of "norm".
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[: max(1, len(parts) - 1)])


def layer_number(name: str) -> int | None:
    """Number of a parameter's layer, None where it belongs to no numbered one."""
    last = layer_of(name).rpartition(".")[2]
    return int(last) if last.isdigit() else None


def group_by_layer(names: Iterable[str], most: int = 64) -> dict[str, list[str]]:
    """Layer -> its parameters' names; joined by their first part when there are more than `most` layers."""
    names = list(names)
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    if len(layers) <= most:
        return layers
    joined: dict[str, list[str]] = {}
    for name in names:
        joined.setdefault(name.split(".")[0], []).append(name)
    return joined


def group_by_number(names: Iterable[str]) -> dict[str, list[str]]:
    """ "layer 0", "layer 1", ... and "other" -> the parameters' names, of a model with one stack of layers."""
    layers: dict[str, list[str]] = {}
    for name in names:
        number = layer_number(name)
        layers.setdefault(OTHER if number is None else f"layer {number}", []).append(name)
    return layers
