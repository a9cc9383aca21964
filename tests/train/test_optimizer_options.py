"""MasterAdamW's options, and gradients, moments and weights that lie in memory otherwise; autograd sees each write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_fused.train.checkpoint import read_state, write_state
from qwen_fused.train.optimizer import MasterAdamW


def halves() -> list[nn.Parameter]:
    """One weight in bfloat16, one in float32."""
    return [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(dtype)) for dtype in (torch.bfloat16, torch.float32)]


def run(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def against_torch(make, changes: list[dict], dtype: torch.dtype = torch.float32, count: int = 8) -> None:
    """MasterAdamW and plain AdamW on float32, given the same gradients in any layout, end alike, rounded once."""
    generator = torch.Generator().manual_seed(1)
    ours = make(dtype)
    start = [p.detach().float().clone(memory_format=torch.contiguous_format).requires_grad_() for p in ours]
    optimizer = MasterAdamW([{"params": [p], **change} for p, change in zip(ours, changes, strict=True)], lr=0.1)
    expected = torch.optim.AdamW(
        [{"params": [p], **change} for p, change in zip(start, changes, strict=True)], lr=0.1, foreach=False
    )
    for step in range(count):
        for p, q in zip(ours, start, strict=True):
            # a first gradient that is large, so that the largest second moment is not the last
            gradient = torch.randn(q.shape, generator=generator) * (100.0 if step == 0 else 0.1)
            p.grad, q.grad = gradient.to(dtype), gradient.to(dtype).float()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, start, strict=True):
        torch.testing.assert_close(p.float(), q.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amsgrad_is_done_per_group(dtype):
    def make(dtype):
        return [nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(3)]

    against_torch(make, [{}, {"amsgrad": True}, {"amsgrad": True, "weight_decay": 0.3}], dtype, count=30)


def test_amsgrad_as_an_argument(tmp_path):
    straight, broken = halves(), halves()
    run(straight, MasterAdamW(straight, amsgrad=True, lr=0.01), range(6))
    first = MasterAdamW(broken, amsgrad=True, lr=0.01)
    run(broken, first, range(3))
    assert set(first.state[broken[0]]) == {"step", "master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    write_state(tmp_path / "o.safetensors", first.state_dict())
    second = MasterAdamW(broken, amsgrad=True, lr=1.0)
    second.load_state_dict(read_state(tmp_path / "o.safetensors"))
    run(broken, second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight, broken, strict=True))


@pytest.mark.parametrize("change", [{"foreach": True}, {"differentiable": True}, {"decoupled_weight_decay": False}])
def test_options_that_would_be_ignored_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be .* for a fused AdamW, got"):
        MasterAdamW([{"params": [nn.Parameter(torch.ones(2))], **change}])


LAYOUTS = {
    "transposed": lambda: torch.linspace(-1, 1, 24).view(4, 6).t(),
    "channels_last": lambda: torch.linspace(-1, 1, 120).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "holes": lambda: torch.linspace(-1, 1, 48).view(4, 12)[:, ::2],
    "contiguous": lambda: torch.linspace(-1, 1, 24).view(4, 6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_other_strides(dtype, layout):
    """As a hand-written backward and a communication buffer give it: contiguous, whatever the parameter is."""
    against_torch(lambda dtype: [nn.Parameter(LAYOUTS[layout]().to(dtype, memory_format=torch.preserve_format))], [{}],
                  dtype)  # fmt: skip


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_of_other_strides(amsgrad):
    """As a checkpoint brings them, and as a parameter leaves them whose own layout changes."""
    values = torch.linspace(-1, 1, 120).view(2, 3, 4, 5)
    straight = nn.Parameter(values.contiguous(memory_format=torch.channels_last))
    plain = nn.Parameter(values.clone())
    first = MasterAdamW([straight], lr=0.1, amsgrad=amsgrad)
    expected = torch.optim.AdamW([plain], lr=0.1, amsgrad=amsgrad, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        gradient = torch.randn(values.shape, generator=generator)
        straight.grad, plain.grad = gradient, gradient.clone()
        if step == 2:
            state = first.state_dict()
            state["state"][0] = {name: value.contiguous() for name, value in state["state"][0].items()}
            first = MasterAdamW([straight], lr=0.1, amsgrad=amsgrad)
            first.load_state_dict(state)
        if step == 4:
            straight.data = straight.data.contiguous()
        first.step()
        expected.step()
    torch.testing.assert_close(straight, plain)


def test_autograd_knows_of_a_step():
    parameters = halves()
    optimizer = MasterAdamW(parameters, amsgrad=True, lr=0.1)
    run(parameters, optimizer, range(1))
    kept = [(t, t._version) for p in parameters for t in (p, *optimizer.state[p].values())]
    run(parameters, optimizer, range(1, 2))
    assert all(t._version > version for t, version in kept)
    w = nn.Parameter(torch.ones(2))
    loss = w.square().sum()
    w.grad = torch.ones(2)
    MasterAdamW([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scaled_gradient_is_written_to():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.full((2,), 8.0)
    optimizer = MasterAdamW([w], lr=0.1)
    optimizer.grad_scale = torch.tensor(8.0)
    version = w.grad._version
    optimizer.step()
    assert w.grad.tolist() == [1.0, 1.0] and w.grad._version > version


def test_refuses_what_it_cannot_step():
    sparse = nn.Parameter(torch.ones(3))
    sparse.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(ValueError, match="gradients must be dense, got layout"):
        MasterAdamW([sparse]).step()
    for dtype in (torch.complex64, torch.int64):
        real = nn.Parameter(torch.ones(3))
        real.grad_dtype = None
        real.grad = torch.ones(3, dtype=dtype)
        with pytest.raises(ValueError, match=f"gradients must be real floating point, got {dtype}"):
            MasterAdamW([real]).step()
    turning = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    turning.grad = torch.ones_like(turning)
    with pytest.raises(ValueError, match="parameters must be real floating point, got torch.complex64"):
        MasterAdamW([turning]).step()


@pytest.mark.parametrize("of_gradient", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gradient_of_another_type(dtype, of_gradient):
    """As where gradients are accumulated in float32, or handed on in half precision."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5).to(dtype)) for _ in range(2))
    p.grad_dtype = None
    ours, expected = MasterAdamW([p], lr=0.1), MasterAdamW([q], lr=0.1)
    for step in range(3):
        p.grad = torch.linspace(1, -2 - step, 5).to(of_gradient)
        q.grad = p.grad.to(dtype)
        ours.step()
        expected.step()
    torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)


def test_a_parameter_twice_in_a_group_is_refused():
    p = nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW([nn.Parameter(torch.ones(2))])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="each parameter once"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1
