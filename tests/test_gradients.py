"""Group gradient norms against 80-bit arithmetic and torch's own: structures, dtypes, magnitudes, on both paths."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen_fused import backends
from qwen_fused.gradients import GradStats, GroupGradNorm, nonfinite_message

ROUNDING = {torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-13}
PATHS = [
    pytest.param("extension", marks=pytest.mark.skipif(not backends.HAS_EXTENSION, reason="extension not built")),
    "reference",
]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    """The compiled op, and then plain torch in its place."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "has_kernel", lambda name, device: False)
    return request.param


def parameter(grad: torch.Tensor | None, like: torch.Tensor | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad if like is None else like))
    p.grad = grad
    return p


def exact_norm(grads: list[torch.Tensor], inv_scale: float = 1.0) -> float:
    """L2 norm in 80-bit floats, whose range no float64 square leaves."""
    total = np.longdouble(0)
    for grad in grads:
        total += np.square(grad.detach().cpu().double().numpy().astype(np.longdouble)).sum()
    return float(np.sqrt(total) * np.longdouble(abs(inv_scale)))


def exact_max(grads: list[torch.Tensor], inv_scale: float = 1.0) -> float:
    return max((grad.detach().double().abs().max().item() * inv_scale for grad in grads if grad.numel()), default=0.0)


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in memory as gradients may come."""
    n = values.numel()
    if layout == "transposed":
        return values.new_empty(3, n).copy_(values.expand(3, n)).t()
    if layout == "channels_last":
        return values.expand(2, 3, 1, n).contiguous(memory_format=torch.channels_last)
    if layout == "holes":
        return values.repeat_interleave(2)[::2]
    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values])[1:]
    if layout == "expanded":
        return values.expand(2, n)
    return values


MAGNITUDES = {
    torch.float16: [1.0, 6e-8, 6e4],
    torch.bfloat16: [1.0, 1e-38, 1e38],
    torch.float32: [1.0, 1e-42, 1e-30, 1e-20, 1e30, 1e38],
    torch.float64: [1.0, 1e-310, 1e-200, 1e153, 1e200, 1e300],
}

tensors = st.builds(
    lambda dtype, magnitude, size, layout: (dtype, magnitude, size, layout),
    st.sampled_from(list(MAGNITUDES)),
    st.integers(0, 5),
    st.one_of(st.integers(0, 70), st.sampled_from([4096, 2**15, 2**15 + 1, 70_000])),
    st.sampled_from(["plain", "transposed", "channels_last", "holes", "unaligned", "expanded", "missing"]),
)


def make(kind, generator: torch.Generator) -> nn.Parameter:
    dtype, magnitude, size, layout = kind
    scale = MAGNITUDES[dtype][magnitude % len(MAGNITUDES[dtype])]
    values = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1) * scale
    if layout == "missing":
        return parameter(None, values.to(dtype))
    return parameter(lay_out(values.to(dtype), layout))


@pytest.mark.parametrize("reference", [False, True])
@settings(max_examples=120, deadline=None)
@given(groups=st.lists(st.lists(tensors, max_size=6), max_size=4), inv_scale=st.sampled_from([1.0, 0.5, 2.0**-16]))
def test_matches_extended_precision(reference: bool, groups, inv_scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    members = {f"group{i}": [make(kind, generator) for kind in kinds] for i, kinds in enumerate(groups)}
    with pytest.MonkeyPatch.context() as patch:
        if reference:
            patch.setattr(backends, "has_kernel", lambda name, device: False)
        stats = GroupGradNorm(members).measure(inv_scale)
    grads = {name: [p.grad for p in group if p.grad is not None] for name, group in members.items()}
    wide = any(grad.dtype == torch.float64 for group in grads.values() for grad in group)
    assert stats.norm.dtype == stats.max_abs.dtype == (torch.float64 if wide else torch.float32)
    assert stats.norm.shape == stats.nonfinite.shape == (len(groups),)
    for i, group in enumerate(grads.values()):
        # beyond the range of the result only Inf or 0 can be right, as the cast says
        for found, exact in ((stats.norm, exact_norm(group, inv_scale)), (stats.max_abs, exact_max(group, inv_scale))):
            expected = torch.tensor(exact, dtype=torch.float64).to(found.dtype)
            smallest = torch.finfo(found.dtype).smallest_normal
            torch.testing.assert_close(found[i], expected, rtol=2e-6, atol=smallest * 2e-6)
            if all(grad.dtype == torch.float64 for grad in group):
                torch.testing.assert_close(found[i], expected, rtol=1e-13, atol=smallest * 1e-13)
    assert stats.nonfinite.tolist() == [0] * len(groups)
    assert stats.first_nonfinite.tolist() == [-1] * len(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(path: str, dtype: torch.dtype) -> None:
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
def test_clip_is_one_rounded_product(path: str, dtype: torch.dtype, layout: str) -> None:
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


def test_groups_are_clipped_apart(path: str) -> None:
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
        "from qwen_fused.gradients import GroupGradNorm\n"
        "pages = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)\n"
        "g = torch.from_numpy(np.frombuffer(pages, dtype=np.float32))\n"
        "p = torch.nn.Parameter(torch.ones_like(g)); p.grad = g\n"
        "n = GroupGradNorm({'p': [p]}); s = n.measure(); n.clip_(s, 1.0); print('alive')\n"
        "n.clip_(n.measure(0.5), 1.0); print('written')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -11


def test_nonfinite_is_counted_and_named(path: str) -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    other = nn.Linear(4, 4)
    for p in [*layers.parameters(), *other.parameters()]:
        p.grad = torch.ones_like(p)
    layers[0].bias.grad = None
    layers[1].weight.grad[2, 1] = math.nan
    layers[2].weight.grad[0] = math.inf
    parts = {str(i): [(f"{i}.{name}", p) for name, p in layer.named_parameters()] for i, layer in enumerate(layers)}
    stats = GroupGradNorm({"layers": parts, "other": other}).measure()
    assert stats.nonfinite.tolist() == [5, 0]
    assert stats.first_nonfinite.tolist() == [2, -1]
    report = stats.to_dict()
    assert list(report) == ["layers", "other", "layers/0", "layers/1", "layers/2"]
    assert report["layers"]["tensor"] == "1.weight"
    assert report["layers/2"]["tensor"] == "2.weight" and report["layers/2"]["first_nonfinite"] == 0
    assert math.isnan(report["layers"]["norm"]) and math.isnan(report["layers"]["max_abs"])
    assert report["layers/2"]["norm"] == report["layers/2"]["max_abs"] == math.inf
    assert report["layers/0"]["norm"] == 4.0 and report["other"]["nonfinite"] == 0
    assert stats.read_later().result() == report or math.isnan(report["layers"]["norm"])
    assert nonfinite_message(report) == ("the gradient is not finite: 5 NaN or Inf in group layers, first in 1.weight")
    for p in layers.parameters():
        if p.grad is not None:
            p.grad.fill_(1.0)
    assert nonfinite_message(GroupGradNorm({"layers": layers}).measure().to_dict()) is None


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 40_000, 70_001])
def test_one_bad_element_is_found_anywhere(path: str, dtype: torch.dtype, bad: float, place: int) -> None:
    grad = torch.ones(70_002, dtype=dtype)
    grad[place] = bad
    stats = GroupGradNorm({"p": [parameter(torch.ones(3)), parameter(grad)]}).measure()
    assert stats.nonfinite.tolist() == [1] and stats.first_nonfinite.tolist() == [1]
    expected = torch.tensor([abs(bad)], dtype=stats.norm.dtype)
    torch.testing.assert_close(stats.norm, expected, equal_nan=True)
    torch.testing.assert_close(stats.max_abs, expected, equal_nan=True)


def test_finite_values_whose_squares_overflow_are_finite(path: str) -> None:
    grads = [torch.full((3,), 2e38), torch.full((2,), 1e-3)]
    stats = GroupGradNorm({"p": [parameter(grad) for grad in grads]}).measure(inv_scale=1e-10)
    torch.testing.assert_close(stats.norm, torch.tensor([2e28 * math.sqrt(3)]))
    assert stats.nonfinite.tolist() == [0]
    # the norm itself may leave float32: it is Inf then, and still no element is bad
    stats = GroupGradNorm({"p": [parameter(grad) for grad in grads]}).measure()
    assert stats.norm.tolist() == [math.inf] and stats.nonfinite.tolist() == [0]


def test_inv_scale_as_a_tensor(path: str) -> None:
    p = parameter(torch.tensor([3.0, 4.0]) * 1024)
    norms = GroupGradNorm({"p": [p]})
    for scale in (torch.tensor(1 / 1024), torch.tensor([1 / 1024], dtype=torch.float64)):
        stats = norms.measure(inv_scale=scale)
        assert stats.norm.tolist() == [5.0] and stats.max_abs.tolist() == [4.0]
    # the tensor may change before the clip: what counts is what was measured
    scale.fill_(7.0)
    norms.clip_(stats, 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)


def test_result_does_not_depend_on_threads() -> None:
    if not backends.HAS_EXTENSION:
        pytest.skip("extension not built")
    sizes = [1, 100_000, 17, 300_000, 5] * 3
    norms = GroupGradNorm({"p": [parameter(torch.randn(n)) for n in sizes]})
    threads = torch.get_num_threads()
    try:
        found = set()
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            found |= {norms.measure().values.numpy().tobytes() for _ in range(5)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_two_thousand_tensors(path: str) -> None:
    members = [parameter(torch.randn(5, 3)) for _ in range(2000)]
    norms = GroupGradNorm({f"g{i}": members[500 * i : 500 * (i + 1)] for i in range(4)})
    stats = norms.measure()
    for i in range(4):
        exact = exact_norm([p.grad for p in members[500 * i : 500 * (i + 1)]])
        assert stats.norm[i].item() == pytest.approx(exact, rel=1e-6)


def test_more_than_two_to_the_31_elements() -> None:
    if not backends.HAS_EXTENSION:
        pytest.skip("extension not built")
    # untouched private pages all read from one huge page of zeros
    n = 2**31 + 40
    pages = mmap.mmap(-1, 2 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    grad = torch.frombuffer(pages, dtype=torch.bfloat16, count=n)
    grad[5], grad[-1] = 3.0, 4.0
    p = nn.Parameter(grad)
    p.grad = grad
    stats = GroupGradNorm({"p": [p]}).measure()
    assert stats.norm.tolist() == [5.0] and stats.max_abs.tolist() == [4.0]


def test_nothing_to_measure(path: str) -> None:
    stats = GroupGradNorm({}).measure()
    assert stats.norm.shape == (0,) and stats.to_dict() == {}
    norms = GroupGradNorm({"empty": [], "none": [parameter(None, torch.ones(3))], "zero": [parameter(torch.ones(0))]})
    stats = norms.measure()
    assert stats.norm.tolist() == [0.0, 0.0, 0.0] and stats.first_nonfinite.tolist() == [-1, -1, -1]
    norms.clip_(stats, 1.0)
    waiting = GroupGradNorm({"none": [parameter(None, torch.ones(3))]})
    assert waiting.measure(0.5).norm.tolist() == [0.0]
    waiting.clip_(waiting.measure(), 1.0)


def test_gradients_that_come_and_go(path: str) -> None:
    members = [parameter(torch.full((4,), float(i + 1))) for i in range(4)]
    norms = GroupGradNorm({"a": members[:2], "b": members[2:]})
    assert norms.measure().norm.tolist() == pytest.approx([math.hypot(2, 4), math.hypot(6, 8)])
    members[0].grad = None
    members[3].grad = torch.tensor([math.nan, 0, 0, 0])
    stats = norms.measure()
    assert stats.norm[0].item() == 4.0 and stats.first_nonfinite.tolist() == [-1, 1]
    members[0].grad = torch.zeros(4)
    members[3].grad = None
    assert norms.measure().norm.tolist() == [4.0, 6.0]


def test_gradients_are_not_modified_by_measure(path: str) -> None:
    p = parameter(torch.randn(50_000))
    before, version = p.grad.clone(), p.grad._version
    GroupGradNorm({"p": [p]}).measure()
    assert torch.equal(p.grad, before) and p.grad._version == version


def test_rejects_bad_input(path: str) -> None:
    p = parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"each parameter must be in one group once, got b\[0\] again after a\[0\]"):
        GroupGradNorm({"a": [p], "b": [p]})
    with pytest.raises(ValueError, match="group a must be a list of parameters, got a Parameter"):
        GroupGradNorm({"a": p})
    with pytest.raises(ValueError, match="group a must hold parameters, got int at 0"):
        GroupGradNorm({"a": [3]})
    norms = GroupGradNorm({"a": [p]})
    stats = norms.measure()
    with pytest.raises(ValueError, match=r"max_norm must name groups among \['a'\], got \['x'\]"):
        norms.clip_(stats, {"x": 1.0})
    with pytest.raises(ValueError, match="max_norm must not be negative, got -1.0"):
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


def test_stats_are_a_snapshot() -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    stats = GroupGradNorm({"p": [p]}).measure()
    p.grad.zero_()
    assert isinstance(stats, GradStats) and stats.norm.tolist() == [5.0]
