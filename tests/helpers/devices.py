"""What a test asks of its device besides tensors.

On the CPU each call stands for the nearest thing there is, so that a GPU test's body runs, and its figures are checked,
on every machine: no slip hides until a GPU is at hand.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# a device to work on while another is the current one
SECOND = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(
        torch.device("cuda:1"),
        id="cuda:1",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")],
    ),
]
# the compiled kernels where there is a GPU, Triton's interpreter where there is none
TRITON = [
    pytest.param(
        torch.device("cpu"),
        id="interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is compiled"),
    ),
    pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu),
]
# clock cycles that no launch outruns: some 30 ms
LONG = 50_000_000


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Make an error of any call that waits for the device; nothing waits for a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def late_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own that is busy for a while first: work that strayed to another one would come too early."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        yield
    # nobody waits on the host: what comes later on the caller's stream comes after it
    torch.cuda.current_stream(device).wait_stream(stream)


def record(device: torch.device, body: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable]:
    """Record body as a CUDA graph: its results, which hold nothing before the first replay, and the replay.

    On the CPU a replay calls body again and copies what it returns over the first results.
    """
    if device.type != "cuda":
        out = tuple(x.detach().clone().zero_() for x in body())

        def replay() -> None:
            for old, new in zip(out, body(), strict=True):
                old.copy_(new.detach())

        return out, replay
    warm = torch.cuda.Stream(device)
    warm.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm):
        for _ in range(2):
            body()
    torch.cuda.current_stream(device).wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = body()
    return out, graph.replay


def in_use(device: torch.device) -> int:
    """Bytes allocated on a CUDA device; on the CPU, tensors that Python still holds."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.memory_allocated(device)
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def repeats(device: torch.device) -> int:
    """Steps after which a leak would show: 500 on CUDA, and a few where only the test itself is tried."""
    return 500 if device.type == "cuda" else 3
