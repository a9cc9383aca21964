"""Group gradient norms against 80-bit arithmetic: structures, dtypes, magnitudes, bad elements, on both paths."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from gradient_cases import MAGNITUDES, exact_max, exact_norm, lay_out, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen_fused import backends
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import GradStats, nonfinite_message

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
            torch.testing.assert_close(found[i], expected, rtol=4e-7, atol=smallest * 2e-6)
            if all(grad.dtype == torch.float64 for grad in group):
                torch.testing.assert_close(found[i], expected, rtol=1e-13, atol=smallest * 1e-13)
    assert stats.nonfinite.tolist() == [0] * len(groups)
    assert stats.first_nonfinite.tolist() == [-1] * len(groups)


@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype in MAGNITUDES for scale in MAGNITUDES[dtype]])
def test_every_magnitude_alone(gradient_path: str, dtype: torch.dtype, scale: float) -> None:
    # nothing larger beside it that would hide a loss
    grad = ((torch.rand(40_003, dtype=torch.float64) * 2 - 1) * scale).to(dtype)
    stats = GroupGradNorm({"p": [parameter(grad)]}).measure()
    for found, exact in ((stats.norm, exact_norm([grad])), (stats.max_abs, exact_max([grad]))):
        expected = torch.tensor([exact], dtype=torch.float64).to(found.dtype)
        # subnormal results are a whole number of the smallest one
        smallest = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, expected, rtol=4e-7, atol=smallest)
    assert stats.nonfinite.tolist() == [0]


def test_nonfinite_is_counted_and_named(gradient_path: str) -> None:
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
def test_one_bad_element_is_found_anywhere(gradient_path: str, dtype: torch.dtype, bad: float, place: int) -> None:
    grad = torch.ones(70_002, dtype=dtype)
    grad[place] = bad
    stats = GroupGradNorm({"p": [parameter(torch.ones(3)), parameter(grad)]}).measure()
    assert stats.nonfinite.tolist() == [1] and stats.first_nonfinite.tolist() == [1]
    expected = torch.tensor([abs(bad)], dtype=stats.norm.dtype)
    torch.testing.assert_close(stats.norm, expected, equal_nan=True)
    torch.testing.assert_close(stats.max_abs, expected, equal_nan=True)


def test_finite_values_whose_squares_overflow_are_finite(gradient_path: str) -> None:
    grads = [torch.full((3,), 2e38), torch.full((2,), 1e-3)]
    stats = GroupGradNorm({"p": [parameter(grad) for grad in grads]}).measure(inv_scale=1e-10)
    torch.testing.assert_close(stats.norm, torch.tensor([2e28 * math.sqrt(3)]))
    assert stats.nonfinite.tolist() == [0]
    # each square fits, their sum does not
    stats = GroupGradNorm(
        {"p": [parameter(torch.full((1,), 1.1e154, dtype=torch.float64)) for _ in range(4)]}
    ).measure()
    torch.testing.assert_close(stats.norm, torch.tensor([2.2e154], dtype=torch.float64))
    # the norm itself may leave float32: it is Inf then, and still no element is bad
    stats = GroupGradNorm({"p": [parameter(grad) for grad in grads]}).measure()
    assert stats.norm.tolist() == [math.inf] and stats.nonfinite.tolist() == [0]


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


def test_two_thousand_tensors(gradient_path: str) -> None:
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


def test_nothing_to_measure(gradient_path: str) -> None:
    stats = GroupGradNorm({}).measure()
    assert stats.norm.shape == (0,) and stats.to_dict() == {}
    norms = GroupGradNorm({"empty": [], "none": [parameter(None, torch.ones(3))], "zero": [parameter(torch.ones(0))]})
    stats = norms.measure()
    assert stats.norm.tolist() == [0.0, 0.0, 0.0] and stats.first_nonfinite.tolist() == [-1, -1, -1]
    norms.clip_(stats, 1.0)
    waiting = GroupGradNorm({"none": [parameter(None, torch.ones(3))]})
    assert waiting.measure(0.5).norm.tolist() == [0.0]
    waiting.clip_(waiting.measure(), 1.0)


def test_gradients_that_come_and_go(gradient_path: str) -> None:
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


def test_gradients_are_not_modified_by_measure(gradient_path: str) -> None:
    p = parameter(torch.randn(50_000))
    before, version = p.grad.clone(), p.grad._version
    GroupGradNorm({"p": [p]}).measure()
    assert torch.equal(p.grad, before) and p.grad._version == version


def test_stats_are_a_snapshot() -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    stats = GroupGradNorm({"p": [p]}).measure()
    p.grad.zero_()
    assert isinstance(stats, GradStats) and stats.norm.tolist() == [5.0]
