"""The compiled ops called past every public function, with whatever comes: a ValueError or a right result, no crash.

raw_calls.py says how to make a long run of it.
"""

from __future__ import annotations

import pytest
import torch
from efe_cases import ALL_TERMS, assert_agrees
from hypothesis import given
from hypothesis import strategies as st
from raw_calls import EXTREMES, FLOATS, LONG, STRANGE, laid_out, spoiled
from torch import Tensor

from qwen_fused import backends
from qwen_fused.kernels.reference import HARD_MODES, TERMS, active_terms, efe_loss_reference

pytestmark = pytest.mark.skipif(not backends.HAS_EXTENSION, reason=f"no extension: {backends.EXTENSION_ERROR}")
NAMES = ("plan", "back", "preference", "anchor", "obs_entropy", "prompt_colors", "step_weight", "class_weight")
WEIGHTS = {name: getattr(ALL_TERMS, name) for name in TERMS}
VALUES = tuple(WEIGHTS.values())


@st.composite
def losses(draw) -> dict[str, Tensor]:
    """Arguments of the loss that fit together, by their names in the schema."""
    B, T, C, H, W = (draw(st.integers(*of)) for of in ((0, 3), (1, 4), (1, 12), (0, 5), (0, 20)))
    shapes = {
        "plan": (B, T, C, H, W), "back": (B, T, C, H, W), "preference": (B, C, H, W), "anchor": (C, H, W),
        "obs_entropy": (C,), "prompt_colors": (B, C), "step_weight": (T,), "class_weight": (C,),
    }  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    case: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == "plan" or draw(st.booleans()):
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            if name in ("plan", "class_weight"):
                # away from where the prompt's cosine, or the cross-entropy's division, turns on every rounding
                x = x.abs() + 0.5
            case[name] = laid_out(draw, x.to(draw(st.sampled_from(FLOATS))))
    target = torch.randint(0, C, (B, H, W), generator=g)
    target[torch.rand(B, H, W, generator=g) < 0.2] = -100
    case["target"] = laid_out(
        draw, target.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8])))
    )
    return case


def on(case: dict[str, Tensor | None]) -> list[bool]:
    """The terms whose inputs are there."""
    inputs = ("back", "preference", "anchor", "obs_entropy", "prompt_colors")
    return [*active_terms(WEIGHTS, **{name: case.get(name) for name in inputs}).values()]


def forward(case: dict[str, Tensor], hard_mode: int, ignore_index: int = -100, weights: tuple = VALUES):
    """All arguments up to the weights, in the order of the schema, and what the op makes of them."""
    arguments = [case["plan"], case["target"], *(case.get(name) for name in NAMES[1:]), None]
    return arguments, torch.ops.qwen_fused.efe_loss(*arguments, on(case), weights, 0.3, hard_mode, ignore_index)


def described(found) -> list[tuple]:
    """Shapes, types and the strides that count."""
    strides = [[x.stride(k) for k in range(x.dim()) if x.shape[k] > 1 and x.numel()] for x in found]
    return [(x.shape, x.dtype, stride) for x, stride in zip(found, strides, strict=True)]


def on_meta(x):
    """The same tensor without its memory; anything else as it is."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


@LONG
@given(case=losses(), hard_mode=st.integers(0, 2))
def test_loss_of_any_strides_and_dtypes_is_right(case, hard_mode):
    found = forward(case, hard_mode)[1]
    loss, terms, solved, predicted = found[:4]
    assert described(found) == described(forward({name: on_meta(x) for name, x in case.items()}, hard_mode)[1])
    wide = {name: x.double() if x.is_floating_point() else x.long() for name, x in case.items()}
    plan, target = wide.pop("plan"), wide.pop("target")
    expected = efe_loss_reference(
        plan, target, weights=WEIGHTS, hard_floor=0.3, hard_mode=HARD_MODES[hard_mode], **wide
    )
    absolute = 1e-5 * max(1.0, *(x.abs().max().item() for x in expected[1].values() if x.numel()), 1.0)
    assert_agrees(loss, expected[0], loss.dtype, "loss", absolute)
    for column, name in enumerate(TERMS):
        if name in expected[1]:
            assert_agrees(terms[:, column], expected[1][name], loss.dtype, name, absolute)
    assert torch.equal(solved, expected[4]) and torch.equal(predicted, expected[5])


@LONG
@given(case=losses(), hard_mode=st.integers(0, 2), needs=st.lists(st.booleans(), min_size=5, max_size=5))
def test_gradients_of_any_strides_and_dtypes_are_right(case, hard_mode, needs):
    arguments, (_, _, _, predicted, *saved) = forward(case, hard_mode)
    names = ("plan", "back", "preference", "obs_entropy", "prompt_colors")
    needs = [need and name in case for need, name in zip(needs, names, strict=True)]
    rest = (torch.tensor(2.0), *arguments, predicted, *saved, on(case), VALUES, 0.3, hard_mode, -100, needs)
    found = torch.ops.qwen_fused.efe_loss_backward(*rest)
    assert described(found) == described(torch.ops.qwen_fused.efe_loss_backward(*map(on_meta, rest)))

    wide = {name: x.double() if x.is_floating_point() else x.long() for name, x in case.items()}
    wanted = {name: wide[name].requires_grad_() for name, need in zip(names, needs, strict=True) if need}
    plan, target = wide.pop("plan"), wide.pop("target")
    loss = efe_loss_reference(plan, target, weights=WEIGHTS, hard_floor=0.3, hard_mode=HARD_MODES[hard_mode], **wide)[0]
    if loss.requires_grad:
        (2 * loss).backward()
    for name, gradient in zip(names, found, strict=True):
        if name not in wanted:
            assert gradient.shape == (0,)
            continue
        assert gradient.dtype == case[name].dtype
        expected = torch.zeros_like(wanted[name]) if wanted[name].grad is None else wanted[name].grad
        assert_agrees(gradient, expected, gradient.dtype, name, 1e-6 * max(1.0, loss.abs().item()))


def test_a_small_gradient_has_its_inputs_strides():
    """As its fake tensor says: a compiled step asserts them."""
    case = {"plan": torch.randn(3, 2, 4, 2, 2), "target": torch.zeros(3, 2, 2, dtype=torch.int64)}
    case["prompt_colors"] = torch.randn(4, 3).t()
    arguments, out = forward(case, 0)
    needs = [False, False, False, False, True]
    found = torch.ops.qwen_fused.efe_loss_backward(
        torch.ones(()), *arguments, *out[3:], on(case), VALUES, 0.3, 0, -100, needs
    )
    assert found[4].stride() == case["prompt_colors"].stride() == (1, 3)


@LONG
@given(case=losses(), data=st.data())
def test_wrong_arguments_of_the_loss(case, data):
    name = data.draw(st.sampled_from(sorted(case)))
    case[name] = spoiled(data.draw, case[name], (*STRANGE, "none"))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, *EXTREMES]), min_size=5, max_size=7))
    try:
        _, out = forward(case, data.draw(st.integers(-1, 3)), data.draw(st.sampled_from([-100, 0, 2**40])), weights)
    except (ValueError, NotImplementedError) as error:
        assert str(error)
        return
    assert out[0].shape == () and out[3].shape == case["target"].shape


@LONG
@given(case=losses(), data=st.data())
def test_wrong_arguments_of_the_backward(case, data):
    hard_mode = data.draw(st.integers(0, 2))
    arguments, (_, _, _, predicted, *saved) = forward(case, hard_mode)
    grad = torch.ones(())
    place = data.draw(st.integers(0, 6))
    if place == 0:
        grad = spoiled(data.draw, grad, (*STRANGE, "none"))
    elif place == 1:
        predicted = data.draw(st.sampled_from([None, predicted[:1], predicted.long(), predicted.to_sparse()]))
    elif place < 6:
        saved[place - 2] = spoiled(data.draw, saved[place - 2], (*STRANGE, "none"))
    else:
        arguments[2 + data.draw(st.integers(0, 6))] = None
    needs = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    needs = [need and x is not None for need, x in zip(needs, [arguments[k] for k in (0, 2, 3, 5, 6)], strict=True)]
    try:
        found = torch.ops.qwen_fused.efe_loss_backward(
            grad, *arguments, predicted, *saved, on(case), VALUES, 0.3, hard_mode, -100, needs
        )
    except (ValueError, NotImplementedError) as error:
        assert str(error)
        return
    assert found[0].shape == (arguments[0].shape if needs[0] else (0,))
