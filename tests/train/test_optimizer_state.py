"""What MasterAdamW loads: of its own precision and shared with nobody, whole, of its own shape, as hooks leave it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qwen_fused.train.optimizer import MASTER, MasterAdamW

DTYPES = [torch.bfloat16, torch.float32]


def run(optimizer: MasterAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def trained(*shapes: int, dtype: torch.dtype) -> tuple[list[nn.Parameter], MasterAdamW]:
    parameters = [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in shapes]
    optimizer = MasterAdamW(parameters, lr=0.03)
    run(optimizer, range(4))
    return parameters, optimizer


def twin(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], MasterAdamW]:
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    return twins, MasterAdamW(twins, lr=0.03)


def values(optimizer: MasterAdamW) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_optimizers_share_nothing(dtype):
    """As where a population is copied inside a process: torch's own go on with one tensor, and one count of steps."""
    ours, first = trained(5, dtype=dtype)
    theirs, second = twin(ours)
    second.load_state_dict(first.state_dict())
    before = values(second)
    run(first, range(4, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, values(second), strict=True))
    run(second, range(4, 6))
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("saved", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_saved_in_another_type_is_float32_again(dtype, saved):
    ours, first = trained(5, dtype=dtype)
    theirs, second = twin(ours)
    state = copy.deepcopy(first.state_dict())
    state["state"][0] = {k: v if k == "step" else v.to(saved) for k, v in state["state"][0].items()}
    second.load_state_dict(state)
    run(second, range(4, 8))
    assert {value.dtype for value in second.state[theirs[0]].values()} == {torch.float32}
    run(first, range(4, 8))
    torch.testing.assert_close(theirs[0], ours[0], rtol=0, atol=4e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_whole_is_refused(dtype, name):
    ours, first = trained(5, dtype=dtype)
    _, second = twin(ours)
    state = copy.deepcopy(first.state_dict())
    del state["state"][0][name]
    with pytest.raises(ValueError, match=f"optimizer state must hold {name} of each parameter, got"):
        second.load_state_dict(state)
    assert not second.state


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_of_another_shape_is_refused(dtype):
    """One element and four: the one would be spread over the four."""
    _, first = trained(4, 1, dtype=dtype)
    _, second = trained(1, 4, dtype=dtype)
    before = values(second)
    with pytest.raises(ValueError, match=r"shape of its parameter, \(1,\), got (master|exp_avg) of shape \(4,\)"):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, values(second), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hooks_have_the_last_word(dtype):
    """One that gives the state in another order, as torch's page shows it, and one that writes to what was loaded."""
    ours, first = trained(5, 5, dtype=dtype)
    theirs, second = twin(ours[::-1])

    def reordered(_, state):
        return {**state, "state": {0: state["state"][1], 1: state["state"][0]}}

    def reset(optimizer):
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    second.register_load_state_dict_pre_hook(reordered)
    second.register_load_state_dict_post_hook(reset)
    second.load_state_dict(first.state_dict())
    for p, q in zip(ours[::-1], theirs, strict=True):
        for name, value in first.state[p].items():
            got = second.state[q][name]
            assert torch.equal(got, torch.zeros_like(value) if name == "exp_avg" else value), name
    assert (MASTER in second.state[theirs[0]]) == (dtype == torch.bfloat16)
