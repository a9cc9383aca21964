"""Clipping per group: torch's rule, one rounded product, no needless write; and what the public edge refuses."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from gradient_cases import MAGNITUDES, lay_out, parameter
from torch import nn

from qwen_fused import backends
from qwen_fused.norms.group_grad_norm import GroupGradNorm

ROUNDING = {torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(gradient_path: str, dtype: torch.dtype) -> None:
    ours = {"a": [], "b": []}
    theirs = {"a": [], "b": []}
    for name, scale in (("a", 3.0), ("b", 1e-3)):
        for size in (1, 7, 300, 5000):
            grad = torch.randn(size, dtype=dtype) * scale
            ours[name].append(parameter(grad.clone()))
            theirs[name].append(parameter(grad.clone()))
    norms = GroupGradNorm(ours)
    stats = norms.measure()
    for i, group in enumerate(theirs.values()):
        total = torch.nn.utils.get_total_norm([p.grad for p in group])
        torch.testing.assert_close(stats.norm[i], total, rtol=ROUNDING[dtype], atol=0)
        largest = torch.nn.utils.get_total_norm([p.grad for p in group], norm_type=math.inf)
        assert stats.max_abs[i] == largest
        torch.nn.utils.clip_grad_norm_(group, 1.0)
    norms.clip_(stats, 1.0)
    for name in ours:
        for p, q in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=4 * ROUNDING[dtype], atol=0)
    assert norms.measure().norm[0] <= 1.0


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "channels_last", "holes", "unaligned"])
def test_clip_is_one_rounded_product(gradient_path: str, dtype: torch.dtype, layout: str) -> None:
    values = torch.randn(1003, dtype=torch.float64).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    p = parameter(lay_out(values.clone(), layout))
    before = p.grad.clone()
    norms = GroupGradNorm({"p": [p]})
    # a measurement that the gradient does not have, so that Inf and NaN pass through a finite factor
    stats = norms.measure(0.25)
    stats.values[0] = 8.0
    norms.clip_(stats, {"p": 2.0})
    factor = torch.tensor(2.0 / (8.0 + 1e-6) * 0.25, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wide = before.double() if dtype == torch.float64 else before.float()
    spacing = torch.finfo(dtype).eps
    # one unit in the last place where the factor itself was rounded otherwise
    torch.testing.assert_close(p.grad, (wide * factor).to(dtype), rtol=spacing, atol=0, equal_nan=True)
    assert (p.grad != (wide * factor).to(dtype)).sum() < 0.02 * p.grad.numel() + p.grad.isnan().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    """All 65536 of them, NaN and subnormals too, and products that overflow, vanish and lie between two."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for factor in (0.999, 0.5, 1.0 + 2**-9, 3e-5, 7e4, -1.0, 0.0, math.inf, math.nan):
        # an odd length, so that the rest of a vector is met too
        p = parameter(torch.cat([every, every[:13]]))
        wide = p.grad.float() * torch.tensor(factor, dtype=torch.float32)
        norms = GroupGradNorm({"p": [p]})
        stats = norms.measure()
        stats.values[2] = factor
        norms.clip_(stats, math.inf)
        assert torch.equal(p.grad.isnan(), wide.isnan())
        torch.testing.assert_close(p.grad, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
        signs = ~wide.isnan()
        assert torch.equal(p.grad.signbit()[signs], wide.signbit()[signs])


def test_bounds_on_the_device(gradient_path: str) -> None:
    def clipped(bound, dtype=torch.float32) -> list[float]:
        a, b = parameter(torch.tensor([8.0], dtype=dtype)), parameter(torch.tensor([4.0]))
        norms = GroupGradNorm({"a": [a], "b": [b]})
        norms.clip_(norms.measure(0.5), bound)
        return [a.grad.item(), b.grad.item()]

    close = pytest.approx
    one = torch.ones
    for dtype in (torch.float32, torch.float64):
        assert clipped(one((), dtype=dtype)) == close([1.0, 1.0], rel=1e-5)
        assert clipped(one(1, dtype=dtype), torch.float64) == close([1.0, 1.0], rel=1e-5)
        assert clipped(torch.tensor([0.5, 9.0], dtype=dtype)) == close([0.5, 2.0], rel=1e-5)
        assert clipped({"b": torch.tensor([0.25], dtype=dtype)}) == close([4.0, 0.25], rel=1e-5)
        assert clipped({"a": 2.0, "b": torch.tensor(1.0, dtype=dtype)}) == close([2.0, 1.0], rel=1e-5)
        assert clipped(torch.tensor([math.inf, 0.0], dtype=dtype)) == [4.0, 0.0]
    assert clipped(torch.tensor([2, 1])) == close([2.0, 1.0], rel=1e-5)
    # what can't be looked at without a wait must show
    assert [math.isnan(x) for x in clipped(torch.tensor([-1.0, math.nan]))] == [True, True]
    # a bound that is computed from what was measured, and its graph, change nothing
    assert clipped(one((), requires_grad=True) * 1.0) == close([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (torch.ones(3), r"max_norm must have one element, or one for each group, got \(3,\)"),
        ({"a": torch.ones(2)}, "max_norm must have one element"),
        (torch.ones((), device="meta"), "max_norm must be on cpu like the gradients, got meta"),
        (torch.ones((), dtype=torch.complex64), "max_norm must hold real numbers, got torch.complex64"),
        ({1: 1.0}, r"max_norm must name groups among \['a', 'b'\], got \['1'\]"),
    ],
)
def test_rejects_bounds(gradient_path: str, bound, message: str) -> None:
    norms = GroupGradNorm({"a": [parameter(torch.ones(1))], "b": [parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=message):
        norms.clip_(norms.measure(), bound)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, r"the gradient is not finite: 1 NaN or Inf in group b, first in b\[1\]"),
        (math.inf, "the gradient is not finite: 1 NaN or Inf in group b"),
        (3e38, "the gradient's norm leaves its range: group b has norm inf"),
    ],
)
def test_error_if_nonfinite(gradient_path: str, bad: float, message: str) -> None:
    a, b, c = (parameter(torch.full((2,), 3e38)) for _ in range(3))
    a.grad.fill_(8.0)
    c.grad[0] = bad
    norms = GroupGradNorm({"a": [a], "b": [b, c]})
    stats = norms.measure()
    with pytest.raises(RuntimeError, match=message):
        norms.clip_(stats, 1.0, error_if_nonfinite=True)
    assert a.grad.tolist() == [8.0, 8.0]
    b.grad.fill_(1.0)
    c.grad.fill_(1.0)
    norms.clip_(norms.measure(), 1.0, error_if_nonfinite=True)
    assert float(a.grad.norm()) == pytest.approx(1.0, rel=1e-5)


def test_groups_are_clipped_apart(gradient_path: str) -> None:
    big, small, free = parameter(torch.full((4,), 10.0)), parameter(torch.full((4,), 0.1)), parameter(torch.ones(4))
    norms = GroupGradNorm({"big": [big], "small": [small], "free": [free]})
    norms.clip_(norms.measure(), {"big": 1.0, "small": 1.0})
    torch.testing.assert_close(big.grad, torch.full((4,), 0.5))
    assert torch.equal(small.grad, torch.full((4,), 0.1))
    assert torch.equal(free.grad, torch.ones(4))
    norms.clip_(norms.measure(inv_scale=0.5), {})
    assert torch.equal(free.grad, torch.full((4,), 0.5))


def test_clip_does_not_write_where_the_factor_is_one() -> None:
    if not backends.HAS_EXTENSION:
        pytest.skip("extension not built")
    # a store into read-only pages kills the child
    code = (
        "import mmap, numpy as np, torch, warnings; warnings.simplefilter('ignore')\n"
        "from qwen_fused.norms.group_grad_norm import GroupGradNorm\n"
        "pages = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)\n"
        "g = torch.from_numpy(np.frombuffer(pages, dtype=np.float32))\n"
        "p = torch.nn.Parameter(torch.ones_like(g)); p.grad = g\n"
        "n = GroupGradNorm({'p': [p]}); s = n.measure(); n.clip_(s, 1.0); print('alive')\n"
        "n.clip_(n.measure(0.5), 1.0); print('written')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -11


def test_inv_scale_as_a_tensor(gradient_path: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]) * 1024)
    norms = GroupGradNorm({"p": [p]})
    for scale in (torch.tensor(1 / 1024), torch.tensor([1 / 1024], dtype=torch.float64)):
        stats = norms.measure(inv_scale=scale)
        assert stats.norm.tolist() == [5.0] and stats.max_abs.tolist() == [4.0]
    # the tensor may change before the clip: what counts is what was measured
    scale.fill_(7.0)
    norms.clip_(stats, 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)


def test_rejects_bad_input(gradient_path: str) -> None:
    p = parameter(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"in one group once, got b\[0\] of group b again after a\[0\] of group a; .* tied"
    ):
        GroupGradNorm({"a": [p], "b": [p]})
    with pytest.raises(ValueError, match="group a must be a list of parameters, got a Parameter"):
        GroupGradNorm({"a": p})
    with pytest.raises(ValueError, match="group a must hold parameters, got int at 0"):
        GroupGradNorm({"a": [3]})
    norms = GroupGradNorm({"a": [p]})
    stats = norms.measure()
    with pytest.raises(ValueError, match=r"max_norm must name groups among \['a'\], got \['x'\]"):
        norms.clip_(stats, {"x": 1.0})
    with pytest.raises(ValueError, match="max_norm must be a number of at least 0, .*, got -1.0"):
        norms.clip_(stats, -1.0)
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(ValueError, match="gradient 0 must be dense, got layout"):
        GroupGradNorm({"a": [parameter(sparse, like=torch.ones(3))]}).measure()
    with pytest.raises(ValueError, match="must be float16, bfloat16, float32 or float64, got"):
        GroupGradNorm({"a": [parameter(torch.ones(3, dtype=torch.complex64))]}).measure()
    elsewhere = parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="gradients must share one device: gradient 0 is on cpu, gradient 1 on meta"):
        GroupGradNorm({"a": [p, elsewhere]}).measure()


def test_names_default_to_places() -> None:
    norms = GroupGradNorm({"a": [parameter(torch.ones(2))], "b": nn.Linear(2, 2)})
    assert norms.tensors == {"a": ["a[0]"], "b": ["weight", "bias"]}


@pytest.mark.skipif(not backends.HAS_EXTENSION, reason="extension not built")
def test_opcheck() -> None:
    grads = [torch.randn(5), torch.randn(3, 4), torch.randn(0)]
    rows = [0, 2, 0, 2, 3, 2]
    measure = torch.ops.qwen_fused.group_grad_norm.default
    for dtype in (torch.float32, torch.float64):
        cast = [grad.to(dtype) for grad in grads]
        torch.library.opcheck(measure, (cast, rows, [], 0.5, None))
        torch.library.opcheck(measure, (cast, rows, [1, 2, 5], 1.0, torch.ones(())))
        values, _ = measure(cast, rows, [], 1.0, None)
        clip = torch.ops.qwen_fused.group_grad_clip_.default
        torch.library.opcheck(clip, (cast, rows, values, [1.0, 2.0]))
        torch.library.opcheck(clip, (cast, rows, values, [], torch.tensor([1.0, 2.0], dtype=torch.float64)))
