"""Norms of gradients whose elements are alike: their roundings all go one way, and the bound that is promised holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_cases import exact_norm, parameter

from qwen_fused.norms.group_grad_norm import GroupGradNorm

# the docstring of GroupGradNorm
PROMISED = {torch.float16: 4e-7, torch.bfloat16: 4e-7, torch.float32: 4e-7, torch.float64: 1e-13}


def error(grad: torch.Tensor) -> float:
    norm = GroupGradNorm({"p": [parameter(grad)]}).measure().norm.item()
    exact = exact_norm([grad])
    return abs(norm - exact) / exact


@pytest.mark.parametrize("dtype", PROMISED)
@pytest.mark.parametrize("size", [255, 256, 4096, 32768, 300_007])
def test_elements_alike(gradient_path: str, dtype: torch.dtype, size: int) -> None:
    values = [1 + k / 97 for k in range(97)] if size < 100_000 else [1.3675, 1.4275, 1.815, 1.1]
    assert max(error(torch.full((size,), value, dtype=dtype)) for value in values) < PROMISED[dtype]


@pytest.mark.parametrize("dtype", PROMISED)
def test_few_values(gradient_path: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    for values in ([0, 0.3, 0.6], [1.0, 1.0001], [3e-5, 7.0]):
        grad = torch.from_numpy(generator.choice(values, 100_003)).to(dtype)
        assert error(grad) < PROMISED[dtype]
