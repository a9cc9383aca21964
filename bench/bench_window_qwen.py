"""The window at Qwen2.5-0.5B's true shape in float32, where nearly all of a batch is the pass through Qwen.

The comparison is that of `bench_window.py`, gradients first. On a CPU, prompts of at most 80 tokens, which hold a small
demonstration, and batches of two: ten batches through Qwen are some 3.5 TFLOP, and a pass for each prompt a quarter of
them. Weights, their gradient and the one to compare it with take 6 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_window import SIDES, compare, planner
from harness import Comparison, benchmark_one, default_device
from material import HALF_BILLION, SMALL, save_qwen

from qwen_fused.config import TrainConfig

# tokens of a prompt at most, and episodes in a batch
SIZES = {"cpu": (80, 2), "cuda": (256, 8)}


def shaped(shape: dict, name: str, device: torch.device) -> Comparison:
    """The window over a Qwen of a shape, with prompts that return as in training."""
    tokens, batch_size = SIZES[device.type]
    with tempfile.TemporaryDirectory() as folder:
        # half the disk; what is loaded is computed with in float32
        model = planner(save_qwen(Path(folder), shape, torch.bfloat16), tokens, device)
    case = f"{name}, {tokens} tokens"
    return compare(model, case, TrainConfig().prompt_visits, batch_size, device, "window_qwen")


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    """What the suite measures; nothing where there is a CPU and no time."""
    if level == "full" or device.type == "cuda":
        yield shaped(HALF_BILLION, "Qwen2.5-0.5B's shape", device)


@pytest.fixture(scope="module")
def small() -> Comparison:
    return shaped(SMALL, "a small Qwen2", default_device())


@pytest.mark.parametrize("side", SIDES)
def test_window_qwen(benchmark, small, side: str) -> None:
    benchmark_one(benchmark, small, side)
