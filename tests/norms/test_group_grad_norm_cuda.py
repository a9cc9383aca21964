"""Group gradient norms on a CUDA device: right, repeatable, without a host sync, on any stream, inside a CUDA graph.

Every body runs on the CPU too, see devices.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from devices import SECOND, in_use, late_stream, no_sync, record, repeats, synchronize
from gradient_cases import MAGNITUDES, exact_max, exact_norm, lay_out, parameter
from torch import nn

from qwen_fused import backends
from qwen_fused.norms.group_grad_norm import GroupGradNorm

LAYOUTS = ["plain", "transposed", "channels_last", "holes", "unaligned"]


def on(device: torch.device, grad: torch.Tensor, layout: str = "plain") -> nn.Parameter:
    return parameter(lay_out(grad.to(device), layout))


@pytest.mark.gpu
def test_extension_is_used() -> None:
    assert backends.EXTENSION_HAS_CUDA, backends.describe()


def test_matches_extended_precision(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, magnitudes in MAGNITUDES.items():
        for magnitude in magnitudes:
            values = [torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1 for n in (0, 1, 37, 70_001)]
            group = [on(device, (v * magnitude).to(dtype), LAYOUTS[i]) for i, v in enumerate(values)]
            stats = GroupGradNorm({f"{dtype} {magnitude}": group}).measure(0.5)
            grads = [p.grad for p in group]
            for found, exact in ((stats.norm, exact_norm(grads, 0.5)), (stats.max_abs, exact_max(grads, 0.5))):
                expected = torch.tensor([exact], dtype=torch.float64).to(found.dtype)
                smallest = torch.finfo(found.dtype).smallest_normal
                torch.testing.assert_close(found.cpu(), expected, rtol=4e-7, atol=smallest * 2e-6)
            assert stats.nonfinite.tolist() == [0]


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_elements_are_counted_and_named(device: torch.device, dtype: torch.dtype, bad: float) -> None:
    grad = torch.ones(200_000, dtype=dtype)
    grad[[3, 150_000]] = bad
    group = [on(device, torch.ones(5)), on(device, grad.clone()), on(device, grad)]
    stats = GroupGradNorm({"p": group}).measure()
    assert stats.nonfinite.tolist() == [4] and stats.first_nonfinite.tolist() == [1]
    expected = torch.tensor([bad], dtype=stats.norm.dtype, device=device)
    torch.testing.assert_close(stats.norm, expected, equal_nan=True)
    torch.testing.assert_close(stats.max_abs, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_matches_the_norm_it_measured(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    p = on(device, torch.randn(5003, dtype=torch.float64).to(dtype), layout)
    before = p.grad.detach().cpu().double().clone()
    norms = GroupGradNorm({"p": [p]})
    stats = norms.measure(0.5)
    norms.clip_(stats, 1.0)
    factor = 0.5 * min(1.0, 1.0 / (stats.norm.item() + 1e-6))
    # one unit in the last place where the factor itself was rounded otherwise, and fp16's step below its normal range
    info = torch.finfo(dtype)
    torch.testing.assert_close(
        p.grad.cpu(), (before * factor).to(dtype), rtol=info.eps, atol=info.eps * info.smallest_normal
    )


def test_thousands_of_tensors_and_groups(device: torch.device) -> None:
    grads = torch.randn(3000, 7, device=device)
    parameters = [parameter(row.clone()) for row in grads]
    norms = GroupGradNorm({f"g{i}": [p] for i, p in enumerate(parameters)})
    stats = norms.measure()
    torch.testing.assert_close(stats.norm, grads.norm(dim=1))
    norms.clip_(stats, 0.5)
    # among so many there may be one that is shorter than the bound, and stays as it is
    clipped = torch.stack([p.grad for p in parameters]).norm(dim=1)
    torch.testing.assert_close(clipped, grads.norm(dim=1).clamp(max=0.5))


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    count = 2**31 + 40 if device.type == "cuda" else 4040
    grad = torch.zeros(count, dtype=torch.bfloat16, device=device)
    grad[5], grad[-1] = 3.0, 4.0
    p = nn.Parameter(grad)
    p.grad = grad
    norms = GroupGradNorm({"p": [p]})
    stats = norms.measure()
    assert stats.norm.tolist() == [5.0]
    norms.clip_(stats, 2.5)
    assert (grad[5].item(), grad[-1].item()) == (1.5, 2.0)


def test_the_same_bits_at_every_run(device: torch.device) -> None:
    group = [on(device, torch.randn(n)) for n in (1_000_003, 17, 300_000)]
    norms = GroupGradNorm({"p": group})
    assert len({norms.measure().values.cpu().numpy().tobytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("path", ["extension", "reference"])
def test_nothing_waits_for_the_device(device: torch.device, monkeypatch, path: str) -> None:
    if path == "reference":
        monkeypatch.setattr(backends, "has_kernel", lambda name, device: False)
    group = [parameter(torch.full((1000,), float(i), device=device)) for i in range(8)]
    group[3].grad = None
    norms, half = GroupGradNorm({"a": group[:4], "b": group[4:]}), torch.full((), 0.5, device=device)
    with no_sync(device):
        stats = norms.measure(half)
        norms.clip_(stats, 1.0)
        pending = stats.read_later()
    assert pending.result()["a"]["norm"] == pytest.approx(0.5 * math.sqrt(1000 * (0 + 1 + 4)), rel=1e-6)
    assert exact_norm([p.grad for p in group[4:]]) == pytest.approx(1.0, rel=1e-5)


def test_works_on_the_current_stream(device: torch.device) -> None:
    group = [on(device, torch.full((50_000,), math.nan)) for _ in range(3)]
    fresh = torch.randn(3, 50_000, device=device)
    norms = GroupGradNorm({"p": group})
    synchronize(device)
    with late_stream(device):
        for p, row in zip(group, fresh, strict=True):
            p.grad.copy_(row)
        stats = norms.measure()
        norms.clip_(stats, 1.0)
    assert stats.nonfinite.tolist() == [0]
    assert stats.norm.item() == pytest.approx(exact_norm([fresh]), rel=1e-6)
    assert exact_norm([p.grad for p in group]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("second", SECOND)
def test_works_on_a_device_that_is_not_the_current_one(second: torch.device) -> None:
    group = [on(second, torch.randn(n)) for n in (1000, 70_001)]
    expected = exact_norm([p.grad for p in group])
    norms = GroupGradNorm({"p": group})
    stats = norms.measure(torch.full((), 0.5, device=second))
    norms.clip_(stats, 1.0)
    assert stats.norm.device == group[0].grad.device
    assert stats.read_later().result()["p"]["norm"] == pytest.approx(0.5 * expected, rel=1e-6)
    assert exact_norm([p.grad for p in group]) == pytest.approx(1.0, rel=1e-5)


def test_inside_a_cuda_graph(device: torch.device) -> None:
    group = [on(device, torch.randn(5000)) for _ in range(4)]
    norms = GroupGradNorm({"p": group})

    def body() -> tuple[torch.Tensor]:
        stats = norms.measure()
        norms.clip_(stats, 1.0)
        return (stats.norm,)

    (norm,), replay = record(device, body)
    for scale in (1.0, 10.0):
        for p in group:
            p.grad.copy_(torch.randn(5000) * scale)
        expected = exact_norm([p.grad for p in group])
        replay()
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        assert exact_norm([p.grad for p in group]) == pytest.approx(1.0, rel=1e-5)


def test_leaks_nothing(device: torch.device) -> None:
    group = [on(device, torch.randn(4000), layout) for layout in LAYOUTS]
    norms = GroupGradNorm({"p": group})

    def step() -> None:
        stats = norms.measure()
        norms.clip_(stats, 1.0)
        stats.read_later().result()

    step()
    before = in_use(device)
    for _ in range(repeats(device)):
        step()
    assert in_use(device) == before


def launches(call) -> int:
    """Kernels that the call launches, by the profiler's count."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if "LaunchKernel" in event.key)


@pytest.mark.gpu
def test_two_launches_for_a_model() -> None:
    cuda = torch.device("cuda")
    groups = {"a": [on(cuda, torch.randn(100)) for _ in range(300)], "b": [on(cuda, torch.randn(10))]}
    norms = GroupGradNorm(groups)
    norms.measure()
    assert launches(norms.measure) == 2


@pytest.mark.gpu
def test_refuses_two_devices() -> None:
    here, there = on(torch.device("cpu"), torch.ones(3)), on(torch.device("cuda"), torch.ones(3))
    with pytest.raises(ValueError, match="gradients must share one device: gradient 0 is on cpu, gradient 1 on cuda:0"):
        GroupGradNorm({"a": [here, there]}).measure()
