"""The planner's recurrence: the fused op is the reference, its gradient is right, and padding never enters."""

from __future__ import annotations

import pytest
import torch

from qwen_fused.planner.plan_core import COMPILED, PlanCore, plan_core, plan_core_reference

compiled = pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
PART, NEAR, STEPS = 3, 2, 3


def arguments(palettes: int = 1, *, height: int = 4, width: int = 5, channels: int = 6, dtype=torch.float64) -> list:
    """Arguments of three episodes of different sizes; channels are no multiple of a vector's width."""
    torch.manual_seed(0)
    hidden, parts = 10, (6, 7) if palettes == 1 else (7, 9)
    alive = torch.zeros(3, height, width, dtype=dtype)
    for n in range(3):
        alive[n, : height - n, : width - n % 2] = 1
    shapes = [
        (3, palettes, height, width, channels), (3, hidden), (3, hidden), (channels,),
        (channels, parts[0] * PART + NEAR), (parts[0] * PART + NEAR,),
        (channels + 9 * NEAR + parts[1] * PART, hidden), (hidden,), (hidden, channels),
    ]  # fmt: skip
    state, *weights = (0.5 * torch.randn(shape, dtype=dtype) for shape in shapes)
    state = state * alive[:, None, :, :, None]
    return [state.requires_grad_(), alive, *(w.requires_grad_() for w in weights)]


@compiled
@pytest.mark.parametrize("palettes", [1, 3])
@pytest.mark.parametrize("channels", [6, 16, 24])
def test_matches_reference(palettes, channels):
    inputs = arguments(palettes, channels=channels)
    fused, plain = plan_core(*inputs, PART, STEPS), plan_core_reference(*inputs, PART, STEPS)
    assert fused.grad_fn is not None and "plan_core" in fused.grad_fn.name()
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(plain)
    wanted = [x for x in inputs if x.requires_grad]
    for a, b in zip(
        torch.autograd.grad((fused * weight).sum(), wanted),
        torch.autograd.grad((plain * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@compiled
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (2, 2)])
def test_narrow_grids(shape):
    inputs = arguments(height=shape[0], width=shape[1])
    torch.testing.assert_close(
        plan_core(*inputs, PART, 2), plan_core_reference(*inputs, PART, 2), rtol=1e-12, atol=1e-12
    )


@compiled
@pytest.mark.parametrize("palettes", [1, 2])
def test_gradcheck(palettes):
    inputs = arguments(palettes, height=3, width=3, channels=4)
    assert torch.autograd.gradcheck(lambda *x: plan_core(*x, PART, 2), inputs, fast_mode=True)


@compiled
def test_equal_cells_share_the_gradient_as_in_the_reference():
    # grids are full of equal cells: where several hold the largest value, both must send the gradient the same way
    inputs = arguments()
    with torch.no_grad():
        inputs[0].copy_(torch.ones_like(inputs[0]) * inputs[1][:, None, :, :, None])
    wanted = [x for x in inputs if x.requires_grad]
    both = [torch.autograd.grad(f(*inputs, PART, 1).square().sum(), wanted) for f in (plan_core, plan_core_reference)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@compiled
def test_opcheck():
    state, alive, *weights = arguments()
    torch.library.opcheck(torch.ops.qwen_fused.plan_core.default, (state, alive.bool(), *weights, PART, STEPS))


@compiled
def test_inputs_are_not_modified_and_strides_do_not_matter():
    inputs = arguments()
    before = [x.detach().clone() for x in inputs]
    expected = plan_core(*inputs, PART, STEPS)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    torch.testing.assert_close(plan_core(*strided, PART, STEPS), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@compiled
def test_float32_is_as_close_as_float32_is():
    exact = arguments(channels=16)
    single = [x.detach().float() for x in exact]
    fused = plan_core(*single, PART, STEPS).double()
    torch.testing.assert_close(fused, plan_core(*exact, PART, STEPS), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize(
    ("place", "name"), [(1, "alive"), (2, "scale"), (4, "norm"), (5, "wz"), (6, "bz"), (7, "wc"), (8, "bias")]
)
def test_rejects_bad_input(place, name):
    inputs = [x.detach() for x in arguments()]
    inputs[place] = inputs[place][:-1]
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        plan_core(*inputs, PART, STEPS)


def test_padding_changes_nothing():
    inputs = [x.detach() for x in arguments()]
    wide = list(inputs)
    wide[0] = torch.nn.functional.pad(inputs[0], (0, 0, 0, 3, 0, 2))
    wide[1] = torch.nn.functional.pad(inputs[1], (0, 3, 0, 2))
    small, large = plan_core(*inputs, PART, STEPS), plan_core(*wide, PART, STEPS)
    torch.testing.assert_close(large[..., :4, :5, :], small, rtol=1e-10, atol=1e-12)
    assert large[..., 4:, :, :].abs().max() == 0 and large[..., 5:, :].abs().max() == 0


def test_a_cell_sees_along_its_line_in_one_step():
    torch.manual_seed(0)
    core = PlanCore(32, 4).double()
    state = torch.randn(1, 1, 9, 9, 32, dtype=torch.float64)
    moved = state.clone()
    moved[0, 0, 4, 8] += 3
    alive, prompt = torch.ones(1, 9, 9, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    a, b = (core(s, alive, prompt, 1)[0, 0, 0] for s in (state, moved))
    changed = (a != b).any(-1)
    assert changed[4].all() and changed[:, 8].all()
