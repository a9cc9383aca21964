"""The compiled ops called past every public function, with whatever comes: a ValueError or a right result, no crash.

QWEN_FUSED_RAW_CALLS=20000 HYPOTHESIS_PROFILE=search makes a long run of it, with examples never drawn before.
"""

from __future__ import annotations

import os

import pytest
import torch
from efe_cases import ALL_TERMS, assert_agrees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen_fused import backends
from qwen_fused.kernels.reference import HARD_MODES, efe_loss_reference

pytestmark = pytest.mark.skipif(not backends.HAS_EXTENSION, reason=f"no extension: {backends.EXTENSION_ERROR}")
CALLS = int(os.environ.get("QWEN_FUSED_RAW_CALLS", "150"))
LONG = settings(max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
NAMES = ("plan", "back", "preference", "anchor", "obs_entropy", "prompt_colors", "step_weight", "class_weight")
TERMS = ("ce", "risk", "ambiguity", "agreement", "anchor", "prompt")
WEIGHTS = {name: getattr(ALL_TERMS, name) for name in TERMS}
ON = tuple(WEIGHTS.values())
EXTREMES = (0.0, -1e30, 1e30, float("inf"), float("-inf"), float("nan"))


def laid_out(draw, x: Tensor) -> Tensor:
    """The same numbers under strides of any kind."""
    kind = draw(st.sampled_from(["as it is", "permuted", "sliced", "reversed axes", "expanded"]))
    if x.dim() == 0 or kind == "as it is":
        return x
    if kind == "permuted":
        order = draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute([order.index(k) for k in range(x.dim())])
    if kind == "sliced":
        axis = draw(st.integers(0, x.dim()))
        return torch.stack([x, x], axis).select(axis, 1)
    if kind == "reversed axes":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    return x[:1].expand_as(x)


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
            case[name] = laid_out(draw, x.to(draw(st.sampled_from(FLOATS))))
    target = torch.randint(0, C, (B, H, W), generator=g)
    target[torch.rand(B, H, W, generator=g) < 0.2] = -100
    case["target"] = laid_out(
        draw, target.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8])))
    )
    return case


def spoiled(draw, x: Tensor) -> Tensor:
    """One thing wrong, or strange, with a tensor."""
    kind = draw(st.sampled_from(["dtype", "fewer", "more", "empty", "scalar", "sparse", "meta", "nested", "extreme"]))
    if kind == "dtype":
        return x.to(draw(st.sampled_from(OTHERS)))
    if kind == "fewer":
        return x[:1] if x.dim() else x
    if kind == "more":
        return x[None]
    if kind == "empty":
        return x.new_empty(0)
    if kind == "scalar":
        return x.new_zeros(())
    if kind == "sparse" and x.dim():
        return x.to_sparse()
    if kind == "meta":
        return x.to("meta")
    if kind == "nested" and x.dim() > 1 and x.shape[0]:
        return torch.nested.nested_tensor(list(x))
    if kind == "extreme" and x.numel() and x.is_floating_point():
        # its own storage, in order: a stride of 0 can't be written to, and a permuted one has no flat view
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(EXTREMES))
    return x


def forward(case: dict[str, Tensor], hard_mode: int, ignore_index: int = -100, weights: tuple = ON):
    arguments = [case["plan"], case["target"], *(case.get(name) for name in NAMES[1:])]
    return arguments, torch.ops.qwen_fused.efe_loss(*arguments, weights, 0.3, hard_mode, ignore_index)


@LONG
@given(case=losses(), hard_mode=st.integers(0, 2))
def test_loss_of_any_strides_and_dtypes_is_right(case, hard_mode):
    _, (loss, terms, solved, predicted, *_) = forward(case, hard_mode)
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
@given(case=losses(), data=st.data())
def test_wrong_arguments_of_the_loss(case, data):
    name = data.draw(st.sampled_from(sorted(case)))
    case[name] = spoiled(data.draw, case[name])
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
        grad = spoiled(data.draw, grad)
    elif place == 1:
        predicted = data.draw(st.sampled_from([None, predicted[:1], predicted.long(), predicted.to_sparse()]))
    elif place < 6:
        saved[place - 2] = spoiled(data.draw, saved[place - 2])
    else:
        arguments[2 + data.draw(st.integers(0, 6))] = None
    needs = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    needs = [need and x is not None for need, x in zip(needs, [arguments[k] for k in (0, 2, 3, 5, 6)], strict=True)]
    try:
        found = torch.ops.qwen_fused.efe_loss_backward(
            grad, *arguments, predicted, *saved, list(WEIGHTS.values()), 0.3, hard_mode, -100, needs
        )
    except (ValueError, NotImplementedError) as error:
        assert str(error)
        return
    assert found[0].shape == (arguments[0].shape if needs[0] else (0,))


@st.composite
def gradients(draw) -> list[Tensor]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    found = []
    for _ in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        x = torch.randn(shape, generator=g, dtype=torch.float64).to(draw(st.sampled_from(FLOATS)))
        if draw(st.booleans()):
            # before its strides, as a tensor of stride 0 can't be written to
            x = laid_out(draw, x)
        found.append(x)
    return found


@LONG
@given(grads=gradients(), data=st.data())
def test_gradient_norm_and_clip(grads, data):
    """Rows that fit give the norm of numpy's kind; others, and wrong tensors, are refused."""
    rows = data.draw(st.lists(st.tuples(st.integers(-1, 7), st.integers(-1, 7), st.integers(0, 9)), max_size=3))
    fits = all(0 <= begin <= end <= len(grads) for begin, end, _ in rows)
    position = data.draw(st.sampled_from([[], list(range(len(grads))), [0] * 9]))
    bad = data.draw(st.booleans()) and bool(grads)
    if bad:
        place = data.draw(st.integers(0, len(grads) - 1))
        grads[place] = spoiled(data.draw, grads[place])
    flat = [number for row in rows for number in row]
    before = [x.clone() if x.layout == torch.strided else x for x in grads]
    try:
        values, counts = torch.ops.qwen_fused.group_grad_norm(grads, flat, position, 1.0, None)
        torch.ops.qwen_fused.group_grad_clip_(
            [x.contiguous() if not x.is_nested else x for x in grads],
            flat,
            values,
            data.draw(st.sampled_from([[], [0.5] * len(rows)])),
        )
    except (ValueError, NotImplementedError) as error:
        assert str(error)
        return
    assert counts.shape == (2, len(rows))
    if any(x.is_meta for x in grads):
        # shapes alone: there is no number to be right
        return
    assert fits
    for column, (begin, end, _) in enumerate(rows):
        parts = [x.double().flatten() for x in before[begin:end]]
        whole = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        if whole.isfinite().all():
            assert values[0, column].item() == pytest.approx(whole.norm().item(), rel=1e-5, abs=1e-30)
        assert counts[0, column] == (~whole.isfinite()).sum()
