"""The layer that a parameter's name tells, and what is grouped by it."""

from __future__ import annotations

from qwen_fused.common.layers import group_by_layer, group_by_number, layer_number, layer_of


def test_layer_is_the_name_up_to_its_first_number():
    assert layer_of("model.layers.3.mlp.0.weight") == "model.layers.3"
    assert layer_of("model.norm.weight") == "model.norm" and layer_of("scale") == "scale"
    assert layer_number("model.layers.11.mlp.weight") == 11 and layer_number("model.norm.weight") is None


def test_layers_are_told_apart():
    names = ["prompt.backbone.layers.0.x", "prompt.backbone.layers.11.y", "prompt.backbone.norm.weight"]
    assert group_by_number(names) == {"layer 0": names[:1], "layer 11": names[1:2], "other": names[2:]}
    assert list(group_by_layer(names)) == [
        "prompt.backbone.layers.0",
        "prompt.backbone.layers.11",
        "prompt.backbone.norm",
    ]


def test_more_layers_than_asked_for_are_joined():
    names = [f"{top}.{n}.weight" for top in ("a", "b") for n in range(3)]
    assert group_by_layer(names, most=5) == {"a": names[:3], "b": names[3:]}
    assert len(group_by_layer(names, most=6)) == 6
