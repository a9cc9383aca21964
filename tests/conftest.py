"""Seeds, tolerances per dtype, and the `gpu` marker, for every test."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# nothing here may reach for a model hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# against a float64 reference: one rounding of the output, plus what float32 accumulation loses
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
}


@pytest.fixture
def tolerance():
    """dtype -> keyword arguments of torch.testing.assert_close."""
    return TOLERANCES.__getitem__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)
