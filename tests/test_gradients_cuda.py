"""Group gradient norms on a CUDA device: right, repeatable, without a host sync, and inside a CUDA graph."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_cases import MAGNITUDES, exact_max, exact_norm, lay_out, parameter
from torch import nn

from qwen_fused import backends
from qwen_fused.gradients import GroupGradNorm

pytestmark = pytest.mark.gpu
LAYOUTS = ["plain", "transposed", "channels_last", "holes", "unaligned"]


@pytest.fixture
def no_sync():
    """Any call that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_device(grad: torch.Tensor, layout: str = "plain") -> nn.Parameter:
    return parameter(lay_out(grad.cuda(), layout))


def members(generator: torch.Generator) -> dict[str, list[nn.Parameter]]:
    groups: dict[str, list[nn.Parameter]] = {}
    for dtype, magnitudes in MAGNITUDES.items():
        for magnitude in magnitudes:
            values = [torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1 for n in (0, 1, 37, 70_001)]
            groups[f"{dtype} {magnitude}"] = [
                on_device((v * magnitude).to(dtype), LAYOUTS[i % len(LAYOUTS)]) for i, v in enumerate(values)
            ]
    return groups


def test_extension_is_used() -> None:
    assert backends.EXTENSION_HAS_CUDA, backends.describe()


def test_matches_extended_precision() -> None:
    groups = members(torch.Generator().manual_seed(0))
    for name, group in groups.items():
        stats = GroupGradNorm({name: group}).measure(0.5)
        grads = [p.grad for p in group]
        for found, exact in ((stats.norm, exact_norm(grads, 0.5)), (stats.max_abs, exact_max(grads, 0.5))):
            expected = torch.tensor([exact], dtype=torch.float64).to(found.dtype)
            smallest = torch.finfo(found.dtype).smallest_normal
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-6, atol=smallest * 2e-6)
        assert stats.nonfinite.tolist() == [0]


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_elements_are_counted_and_named(dtype: torch.dtype, bad: float) -> None:
    grad = torch.ones(200_000, dtype=dtype)
    grad[[3, 150_000]] = bad
    stats = GroupGradNorm({"p": [on_device(torch.ones(5)), on_device(grad), on_device(grad)]}).measure()
    assert stats.nonfinite.tolist() == [4] and stats.first_nonfinite.tolist() == [1]
    expected = torch.tensor([bad], dtype=stats.norm.dtype, device="cuda")
    torch.testing.assert_close(stats.norm, expected, equal_nan=True)
    torch.testing.assert_close(stats.max_abs, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_matches_the_cpu(dtype: torch.dtype, layout: str) -> None:
    grad = torch.randn(5003, dtype=torch.float64).to(dtype)
    here, there = parameter(lay_out(grad.clone(), layout)), on_device(grad, layout)
    for p in (here, there):
        norms = GroupGradNorm({"p": [p]})
        norms.clip_(norms.measure(0.5), 1.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=eps, atol=0)


def test_thousands_of_tensors_and_groups() -> None:
    grads = torch.randn(3000, 7, device="cuda")
    parameters = [parameter(row.clone()) for row in grads]
    norms = GroupGradNorm({f"g{i}": [p] for i, p in enumerate(parameters)})
    stats = norms.measure()
    torch.testing.assert_close(stats.norm, grads.norm(dim=1))
    norms.clip_(stats, 0.5)
    torch.testing.assert_close(torch.stack([p.grad for p in parameters]).norm(dim=1), torch.full((3000,), 0.5).cuda())


def test_more_than_two_to_the_31_elements() -> None:
    grad = torch.zeros(2**31 + 40, dtype=torch.bfloat16, device="cuda")
    grad[5], grad[-1] = 3.0, 4.0
    p = nn.Parameter(grad)
    p.grad = grad
    norms = GroupGradNorm({"p": [p]})
    stats = norms.measure()
    assert stats.norm.tolist() == [5.0]
    norms.clip_(stats, 2.5)
    assert (grad[5].item(), grad[-1].item()) == (1.5, 2.0)


def test_the_same_bits_at_every_run() -> None:
    group = [on_device(torch.randn(n)) for n in (1_000_003, 17, 300_000)]
    norms = GroupGradNorm({"p": group})
    assert len({norms.measure().values.cpu().numpy().tobytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("path", ["extension", "reference"])
def test_nothing_waits_for_the_device(no_sync, monkeypatch, path: str) -> None:
    if path == "reference":
        monkeypatch.setattr(backends, "has_kernel", lambda name, device: False)
    group = [parameter(torch.full((1000,), float(i), device="cuda")) for i in range(8)]
    group[3].grad = None
    norms = GroupGradNorm({"a": group[:4], "b": group[4:]})
    stats = norms.measure(torch.full((), 0.5, device="cuda"))
    norms.clip_(stats, 1.0)
    pending = stats.read_later()
    torch.cuda.set_sync_debug_mode("default")
    assert pending.result()["a"]["norm"] == pytest.approx(0.5 * math.sqrt(1000 * (0 + 1 + 4)), rel=1e-6)
    assert exact_norm([p.grad for p in group[4:]]) == pytest.approx(1.0, rel=1e-5)


def test_inside_a_cuda_graph() -> None:
    group = [on_device(torch.randn(5000)) for _ in range(4)]
    norms = GroupGradNorm({"p": group})
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        norms.clip_(norms.measure(), 1e9)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = norms.measure()
        norms.clip_(stats, 1.0)
    for scale in (1.0, 10.0):
        for p in group:
            p.grad.copy_(torch.randn(5000) * scale)
        expected = exact_norm([p.grad for p in group])
        graph.replay()
        assert stats.norm.item() == pytest.approx(expected, rel=1e-6)
        assert exact_norm([p.grad for p in group]) == pytest.approx(1.0, rel=1e-5)


def test_two_launches_for_a_model() -> None:
    from torch.profiler import ProfilerActivity, profile

    norms = GroupGradNorm({"a": [on_device(torch.randn(100)) for _ in range(300)], "b": [on_device(torch.randn(10))]})
    norms.measure()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        norms.measure()
        torch.cuda.synchronize()
    assert sum(event.count for event in trace.key_averages() if "LaunchKernel" in event.key) == 2


def test_refuses_two_devices() -> None:
    with pytest.raises(ValueError, match="gradients must share one device: gradient 0 is on cpu, gradient 1 on cuda:0"):
        GroupGradNorm({"a": [parameter(torch.ones(3)), on_device(torch.ones(3))]}).measure()
