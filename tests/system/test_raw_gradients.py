"""The compiled gradient ops called with whatever comes: a ValueError or a right result, no crash (see raw_calls.py)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_calls import FLOATS, LONG, laid_out, spoiled
from torch import Tensor

from qwen_fused import backends

pytestmark = pytest.mark.skipif(not backends.HAS_EXTENSION, reason=f"no extension: {backends.EXTENSION_ERROR}")


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


@st.composite
def rows_over(draw, count: int) -> list[tuple[int, int, int]]:
    """Rows (begin, end, base) that fit and stand apart, or numbers of any kind."""
    if draw(st.booleans()):
        base = st.sampled_from([0, 9, -1, 2**29, -(2**63)])
        return draw(st.lists(st.tuples(st.integers(-1, 7), st.integers(-1, 7), base), max_size=3))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=4)))
    return [(begin, end, draw(st.integers(0, 9))) for begin, end in itertools.pairwise(cuts)]


def fit(rows: list[tuple[int, int, int]], count: int) -> bool:
    return all(0 <= begin <= end <= count and 0 <= base < 2**29 for begin, end, base in rows)


def one_spoiled(draw, grads: list[Tensor]) -> bool:
    """Whether it has spoiled one of them."""
    if not grads or draw(st.booleans()):
        return False
    place = draw(st.integers(0, len(grads) - 1))
    grads[place] = spoiled(draw, grads[place])
    return True


@LONG
@given(grads=gradients(), data=st.data())
def test_gradient_norm(grads, data):
    """Rows that fit give the norm, the count and the first place; others, and wrong tensors, are refused."""
    draw, count = data.draw, len(grads)
    rows = draw(rows_over(count))
    position = draw(st.sampled_from([[], list(range(3, count + 3)), [0] * 9, [-1] * count, [2**63 - 1] * count]))
    scale = draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))
    scalar = draw(st.sampled_from([None, torch.tensor(0.25), torch.full((1, 1), -4.0).double(), torch.ones(2)]))
    # with no tensor at all torch finds no kernel to call
    sound = fit(rows, count) and (scalar.numel() == 1 if scalar is not None else count > 0)
    sound &= not position or len(position) == count and min(position) >= 0 and max(position) < 2**29
    total = scale * (1.0 if scalar is None else scalar.sum().item())
    if scalar is not None and draw(st.booleans()):
        scalar, sound = spoiled(draw, scalar), False
    bad = one_spoiled(draw, grads)
    flat = [number for row in rows for number in row]
    try:
        values, counts = torch.ops.qwen_fused.group_grad_norm(grads, flat, position, scale, scalar)
    except (ValueError, NotImplementedError) as error:
        assert str(error) and (bad or not sound)
        return
    assert values.shape == (3, len(rows)) and counts.shape == (2, len(rows))
    if values.is_meta or not sound:
        # shapes alone, or a scalar that is strange but one number: there is nothing to be compared with
        return
    for column, (begin, end, base) in enumerate(rows):
        parts = [x.double().flatten() for x in grads[begin:end]]
        whole = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        if whole.isfinite().all():
            assert values[0, column].item() == pytest.approx(whole.norm().item() * abs(total), rel=1e-5, abs=1e-30)
        assert values[2, column] == total
        assert counts[0, column] == (~whole.isfinite()).sum()
        first = next((t for t in range(begin, end) if not grads[t].isfinite().all()), None)
        assert counts[1, column] == (-1 if first is None else (position[first] if position else first) - base)


def overlaps_itself(x: Tensor) -> bool:
    return x.numel() > 0 and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


@LONG
@given(grads=gradients(), data=st.data())
def test_gradient_clip(grads, data):
    """A gradient of a row is multiplied once and rounded once; of a call that is refused, nothing is written."""
    draw, count = data.draw, len(grads)
    rows = draw(rows_over(count))
    apart = sum(max(end - begin, 0) for begin, end, _ in rows) == len({t for row in rows for t in range(*row[:2])})
    numbers = st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e30, math.inf, math.nan])
    bounds = [draw(numbers) for _ in range(len(rows) + draw(st.sampled_from([0, 0, 0, 1, -1])))]
    columns = len(rows) + draw(st.integers(0, 2))
    values = torch.tensor([draw(numbers) for _ in range(3 * columns)], dtype=draw(st.sampled_from(FLOATS[2:])))
    sound = fit(rows, count) and apart
    values = laid_out(draw, values.view(3, columns))
    limits, on_device = bounds, None
    if draw(st.booleans()):
        on_device, bounds = laid_out(draw, torch.tensor(bounds, dtype=torch.float64)), []
        limits = on_device.tolist()
    sound &= len(limits) == len(rows)
    factors = {}
    for r, (begin, end, _) in enumerate(rows if sound else []):
        norm, _, scale = values[:, r].tolist()
        ratio = 1.0 if limits[r] == math.inf else limits[r] / (norm + 1e-6)
        ratio = math.nan if limits[r] < 0 else ratio
        factors |= dict.fromkeys(range(begin, end), scale * (1.0 if ratio > 1.0 else ratio))
    if draw(st.integers(0, 3)) == 0:
        values, sound = spoiled(draw, values), False
    # torch itself refuses to write into a list of those
    grads = [x.resolve_neg() for x in grads]
    sound &= not any(overlaps_itself(grads[t]) and factor != 1.0 for t, factor in factors.items())
    bad = one_spoiled(draw, grads)
    real = all(x.layout == torch.strided and not x.is_nested and not x.is_meta for x in [*grads, values])
    before = [x.clone() for x in grads]
    flat = [number for row in rows for number in row]
    try:
        torch.ops.qwen_fused.group_grad_clip_(grads, flat, values, bounds, on_device)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        assert str(error) and (bad or not sound)
        assert isinstance(error, (ValueError, NotImplementedError)) or "ZeroTensors are immutable" in str(error)
        factors = {}
    else:
        if not sound:
            return
    for t in range(count if real else 0):
        factor = factors.get(t, 1.0)
        product = before[t]
        if factor != 1.0:
            narrow = torch.tensor(factor, dtype=torch.promote_types(product.dtype, torch.float32))
            product = (product.to(narrow.dtype) * narrow).to(product.dtype)
        torch.testing.assert_close(grads[t], product, rtol=0, atol=0, equal_nan=True)
