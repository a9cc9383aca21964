"""What a GPU itself tells of a call: its own time, the kernels that were launched, the waits of the host."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from harness import Call

# of a GPU, at most: how long it waits need not be exact
CYCLES_PER_SECOND = 2e9


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_ms(call: Call, device: torch.device, about: float) -> float:
    """Milliseconds of the device alone for one call, a median of nine.

    The device is kept waiting until the host has launched all of the call, so that no gap between launches counts; in
    a call that itself waits for the device, what follows that wait does count.
    """
    times = []
    for _ in range(9):
        value = call.prepare() if call.prepare else None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        wait(device)
        torch.cuda._sleep(int(CYCLES_PER_SECOND * (2 * about + 1e-3)))
        start.record()
        call.run(value)
        end.record()
        wait(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def launches_and_syncs(call: Call, device: torch.device) -> tuple[int, int]:
    """Kernels that one call starts, and times it makes the host wait for the device."""
    value = call.prepare() if call.prepare else None
    busy, idle = device_events(lambda: call.run(value), device), idle_events(device)
    return busy[0] - idle[0], max(0, busy[1] - idle[1])


@functools.cache
def idle_events(device: torch.device) -> tuple[int, int]:
    """What an empty call shows: the profiler and the wait at its end synchronise, too."""
    return device_events(lambda: None, device)


def device_events(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Launches and synchronisations while `run` runs and until the device is done."""
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        # kernels that still run when the profile ends would not be in it
        wait(device)
    events = trace.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key)
    return launches, sum(event.count for event in events if "Synchronize" in event.key)
