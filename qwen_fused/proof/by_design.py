"""Parameters that a library freezes by design, which are nobody's mistake."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def frozen_by_peft(modules: Mapping[str, nn.Module]) -> set[int]:
    """Ids of the parameters that peft freezes by design: all of a model with adapters but its active adapters."""
    peft = sys.modules.get("peft")
    if peft is None:
        return set()
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    found: set[int] = set()
    for part in (part for module in modules.values() for part in module.modules()):
        if not getattr(part, "peft_config", None):
            continue
        layers = [layer for layer in part.modules() if isinstance(layer, kind)]
        places = {name for layer in layers for name in layer.adapter_layer_names} | {"modules_to_save"}
        active = {name for layer in layers for name in layer.active_adapters}
        for name, parameter in part.named_parameters():
            pieces = set(name.split("."))
            if not (pieces & places and pieces & active):
                found.add(id(parameter))
    return found


def is_sinusoid(parameter: Tensor) -> bool:
    """Whether it is a table of sines and cosines kept as a parameter: each row's squares sum up to half its length."""
    if parameter.dim() != 2 or parameter.shape[1] < 4 or not parameter.is_floating_point():
        return False
    rows = parameter.detach().float()
    half = parameter.shape[1] / 2
    # libraries put zeros in a padding row
    rows = rows[rows.any(1)]
    close = (rows.square().sum(1) - half).abs() < 1e-3 * half
    return bool(rows.numel()) and bool(close.all()) and not torch.allclose(rows, rows[:1].expand_as(rows))
