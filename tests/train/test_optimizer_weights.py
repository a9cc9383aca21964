"""MasterAdamW where somebody else writes to the weights, or changes their type, between two steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qwen_fused.train import optimizer as module
from qwen_fused.train.optimizer import MASTER, MasterAdamW
from qwen_fused.window.prompt_window import PromptWindow

HALF = [torch.bfloat16, torch.float16]


def step(optimizer: MasterAdamW, value: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()


@pytest.mark.parametrize("dtype", HALF)
def test_clamped_weights_stay_clamped(dtype):
    p = nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
    optimizer = MasterAdamW([p], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        step(optimizer)
        with torch.no_grad():
            p.clamp_(-1.0, 1.0)
    step(optimizer)
    torch.testing.assert_close(optimizer.state[p][MASTER], torch.full((3,), 0.997), rtol=1e-4, atol=0)


def test_weights_that_are_loaded_are_stepped_from():
    layer = nn.Linear(2, 2).bfloat16()
    best = copy.deepcopy(layer.state_dict())
    optimizer = MasterAdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(9):
        step(optimizer)
    layer.load_state_dict(best)
    step(optimizer)
    torch.testing.assert_close(layer.weight.float(), best["weight"].float() - 0.1, rtol=0, atol=4e-3)


def test_only_what_was_written_is_taken_up():
    """The rest keeps what of its steps has not shown yet."""
    touched, alone = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = [MasterAdamW([p], lr=1e-4) for p in (touched, alone)]
    for _ in range(5):
        for optimizer in optimizers:
            step(optimizer)
        with torch.no_grad():
            touched[0] = 3.0
    masters = [optimizer.state[p][MASTER] for optimizer, p in zip(optimizers, (touched, alone), strict=True)]
    assert torch.equal(masters[0][1:], masters[1][1:]) and (alone == 1).all()
    assert 2.99 < masters[0][0] < 3.0


def test_a_step_that_nobody_writes_after_looks_at_nothing(monkeypatch):
    """Beside a window, which counts the writes of torch's own fused optimizers, too."""
    PromptWindow(lambda keys: torch.zeros(len(keys), 2), size=1)
    calls = []
    monkeypatch.setattr(module, "take_up", lambda master, parameter, dtype: calls.append(parameter))
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([p])
    for _ in range(4):
        step(optimizer)
    assert len(calls) <= 1


@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
def test_a_model_that_changes_its_type(before, after):
    """Moments go on; weights go on from what they are in the new type, or from the masters that they had."""
    layer = nn.Linear(3, 2, bias=False).to(before)
    optimizer = MasterAdamW(layer.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(4):
        step(optimizer)
    layer.to(after)
    state = optimizer.state[layer.weight]
    start = (state[MASTER] if after in HALF and MASTER in state else layer.weight).detach().double()
    twin = nn.Parameter(start.clone())
    right = torch.optim.AdamW([twin], lr=1e-4, weight_decay=0.0)
    twin.grad = torch.ones_like(twin)
    right.step()
    right.state[twin]["step"].fill_(4)
    for name in ("exp_avg", "exp_avg_sq"):
        right.state[twin][name].copy_(state[name])
    twin.data.copy_(start)
    for _ in range(30):
        step(optimizer)
        twin.grad = torch.ones_like(twin)
        right.step()
    assert (MASTER in state) == (after == torch.float16)
    stepped = state.get(MASTER, layer.weight)
    torch.testing.assert_close(stepped.double(), twin.detach(), rtol=0, atol=1e-6)
    assert layer.weight.dtype == after and torch.equal(layer.weight, stepped.to(after))


def test_a_state_of_half_precision_in_a_float32_model():
    half, whole = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)
    first, second = (MasterAdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for m in (half, whole))
    step(first)
    whole.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        whole.weight.add_(1.0)
    before = whole.weight.detach().clone()
    step(second)
    torch.testing.assert_close(whole.weight, before - 1e-3, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["vector_to_parameters", "data"])
def test_another_tensor_in_data_is_taken_up(dtype, how):
    """It counts as no write; the address tells."""
    p = nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
    optimizer = MasterAdamW([p], lr=1e-2, weight_decay=0.0)
    step(optimizer)
    if how == "data":
        p.data = p.data * 0 + 8
    else:
        nn.utils.vector_to_parameters(torch.full((3,), 8.0, dtype=dtype), [p])
    step(optimizer)
    torch.testing.assert_close(optimizer.state[p][MASTER], torch.full((3,), 7.99), rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_parameters_that_were_left_on_the_meta_device(how):
    with torch.device("meta"):
        layer = nn.Linear(2, 1)
    optimizer = MasterAdamW(layer.parameters())
    if how == "assign":
        layer.load_state_dict(nn.Linear(2, 1).state_dict(), assign=True)
    layer = layer.to_empty(device="cpu")
    layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="params must have memory, got some on the meta device"):
        optimizer.step()
