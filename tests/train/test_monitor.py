"""Each symptom is planted, raises its own hint once, and nothing else does."""

from __future__ import annotations

import math
import re
from dataclasses import fields

import pytest
import torch
import torch.nn as nn

from qwen_fused.config import TrainConfig
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.train.monitor import GradientMonitor, out_of_memory

HEALTHY = {"loss": 4.0, "reward": 0.1, "qwen_grad": 1e-4, "mask_ratio": 0.9, "lr_qwen": 5e-5}


def run(monitor, batches, **changing):
    """Feed batches; each keyword gives a metric as a function of the batch."""
    hints = []
    for step in range(batches):
        hints += monitor.observe(step, HEALTHY | {name: of(step) for name, of in changing.items()})
    return hints


def falling(step):
    return 4.0 * 0.999**step


def symptoms(hints):
    return [(hint.symptom, hint.step) for hint in hints]


def test_healthy_run_raises_nothing():
    noisy = lambda step: falling(step) * (1 + 0.2 * math.sin(7.0 * step))  # noqa: E731
    reward = lambda step: 0.0 if step % 2 else 0.2  # noqa: E731
    assert run(GradientMonitor(), 1500, loss=noisy, reward=reward) == []


def test_no_gradient_for_a_hundred_batches():
    hints = run(GradientMonitor(), 300, loss=falling, qwen_grad=lambda _: 0.0)
    assert symptoms(hints) == [("no gradient", 99)]
    assert "qwen-fused prove" in str(hints[0]) and "100 batches" in str(hints[0])


def test_gradient_once_a_window_is_enough():
    # with a prompt window only the batch that flushes it has a gradient
    assert run(GradientMonitor(), 400, loss=falling, qwen_grad=lambda s: 1e-4 * (s % 10 == 9)) == []


def test_hint_comes_back_after_the_symptom_has_gone():
    hints = run(GradientMonitor(), 400, loss=falling, qwen_grad=lambda s: float(150 <= s < 160))
    assert symptoms(hints) == [("no gradient", 99), ("no gradient", 259)]


def test_exploding_loss():
    def exploding(s: int) -> float:
        return 4.0 if s < 100 else 4.0 * 1.1 ** (s - 100)

    hints = run(GradientMonitor(qwen_lr=1e-3), 200, loss=exploding)
    assert [hint.symptom for hint in hints] == ["exploding"]
    # a fifth of what was asked for, not of somebody else's rate
    assert 110 < hints[0].step < 130 and hints[0].remedy == "lower --qwen-lr from 0.001 to 0.0002"
    assert run(GradientMonitor(), 200, loss=exploding)[0].remedy == "lower the learning rate to a fifth"


def test_one_bad_batch_is_no_explosion():
    assert run(GradientMonitor(), 300, loss=lambda s: 30.0 if s == 50 else falling(s)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number(value):
    hints = run(GradientMonitor(), 60, loss=lambda s: value if s >= 30 else falling(s))
    assert symptoms(hints) == [("not finite", 30)]


def test_flat_loss():
    hints = run(GradientMonitor(), 700, loss=lambda s: 4.0 + 0.05 * math.sin(3.0 * s))
    assert symptoms(hints) == [("flat", 299)]
    assert "mask" in hints[0].remedy and "0.9" in hints[0].remedy and "5e-05" in hints[0].remedy


def test_reward_stuck_at_zero():
    hints = run(GradientMonitor(), 250, loss=falling, reward=lambda s: 0.1 if s < 20 else 0.0)
    assert symptoms(hints) == [("no reward", 119)]
    assert "gate" in hints[0].remedy


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(error):
    hint = out_of_memory(error)
    assert hint.symptom == "out of memory"
    flags = re.findall(r"--([a-z-]+)", hint.remedy)
    known = {f.name for f in fields(TrainConfig)}
    assert len(flags) == 7 and known >= {flag.removeprefix("no-").replace("-", "_") for flag in flags}


def test_real_allocation_failure_is_recognised():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(failure.value).symptom == "out of memory"


def test_other_errors_are_not_explained():
    assert out_of_memory(RuntimeError("shape mismatch")) is None
    assert out_of_memory(ValueError("out of memory")) is None


def test_per_layer_norms_from_the_fused_measure():
    torch.manual_seed(0)
    qwen = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    norms = GroupGradNorm({"qwen": {f"layer {i}": layer for i, layer in enumerate(qwen)}, "agent": nn.Linear(2, 2)})
    monitor = GradientMonitor(patience=5)
    hints = []
    for step in range(8):
        qwen.zero_grad()
        h = torch.ones(1, 4)
        # the middle layer's output never reaches the loss
        (qwen[2](qwen[0](h)) * (step + 1)).sum().backward()
        row = norms.measure().to_dict()
        hints += monitor.observe(step, {"loss": falling(step)}, row)
    assert symptoms(hints) == [("dead layers", 4)] and "layer 1" in hints[0].seen
    assert monitor.layers_zero_for == {"layer 0": 0, "layer 1": 8, "layer 2": 0} and monitor.total_zero_for == 0
    expected = torch.cat([p.grad.flatten() for p in qwen[2].parameters()]).norm().item()
    assert row["qwen/layer 2"]["norm"] == pytest.approx(expected, rel=1e-5)


def test_resumed_monitor_goes_on_counting():
    one, other = GradientMonitor(), GradientMonitor()
    run(one, 60, loss=falling, qwen_grad=lambda _: 0.0)
    other.load_state_dict(one.state_dict())
    step, hints = 60, []
    while not hints:
        hints = other.observe(step, HEALTHY | {"qwen_grad": 0.0})
        assert hints == one.observe(step, HEALTHY | {"qwen_grad": 0.0})
        step += 1
    assert symptoms(hints) == [("no gradient", 99)]
    assert other.state_dict() == one.state_dict()


def test_metrics_left_out_are_left_alone():
    monitor = GradientMonitor(patience=5)
    assert all(monitor.observe(s, {"loss": None, "qwen_grad": None}) == [] for s in range(50))


def test_rejects_bad_patience():
    with pytest.raises(ValueError, match="patience must be at least 5 batches, got 2"):
        GradientMonitor(patience=2)
