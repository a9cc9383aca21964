"""Evaluation mode for a while, as predictions need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Without gradients and, if `model` is an nn.Module, in eval mode for a while."""
    # each module's own mode: a frozen backbone in eval mode must not come back in train mode
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
