"""Parameters are told apart by the layer that their names say."""

from __future__ import annotations

import torch

from qwen_fused.common.layers import group_by_layer, layer_of, numbered_layers


def test_layer_is_the_name_up_to_its_first_number():
    assert layer_of("backbone.layers.3.mlp.experts.5.weight") == "backbone.layers.3"
    assert layer_of("head.linear.weight") == "head.linear" and layer_of("weight") == "weight"


def test_names_are_joined_where_there_are_many_layers():
    names = [f"a.{k}.w" for k in range(3)] + ["b.0.w", "b.0.v"]
    assert group_by_layer(names) == {"a.0": ["a.0.w"], "a.1": ["a.1.w"], "a.2": ["a.2.w"], "b.0": ["b.0.w", "b.0.v"]}
    assert group_by_layer(names, most=3) == {"a": names[:3], "b": names[3:]}


def test_layers_of_a_transformer_are_told_apart():
    names = [
        "prompt.backbone.layers.0.x",
        "prompt.backbone.layers.11.mlp.experts.2.weight",
        "prompt.backbone.norm.weight",
    ]
    layers = numbered_layers([(name, torch.nn.Parameter(torch.zeros(1))) for name in names])
    assert list(layers) == ["layer 0", "layer 11", "other"]
    assert [[name for name, _ in members] for members in layers.values()] == [[name] for name in names]
