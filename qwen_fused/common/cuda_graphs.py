"""CUDA graphs of functions on tensors that stay where they are: recorded once, replayed with one launch."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar
from weakref import WeakSet

import torch

T = TypeVar("T")
Replay = Callable[[], T]
Record = Callable[[Callable[[], T]], Replay[T]]


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that is recorded on: cuBLAS keeps 32 MiB for each that it has seen, for good."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Records functions into graphs that share one pool of memory, and run one after the other on one stream.

    What a function reads must be written in place between replays, and whatever it decides in Python is decided for
    good. Its results lie where they lie, and a replay of any of the graphs may overwrite what a function freed.

    Args:
        device: whose work is recorded.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = recording_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, body: Callable[[], T]) -> Replay[T]:
        """Record what a function launches; nothing of it runs yet.

        Args:
            body: has run before, so that kernels are compiled, and libraries have their handles.

        Returns:
            Runs what was recorded on the current stream, and gives what `body` returned.

        Raises:
            RuntimeError: body does what no graph holds, such as waiting for the device; memory is out.
        """
        if not self.alive:
            # a pool ends with the last of its graphs
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # a step's autograd graph that waits for the collector would hold its parameters to the stream of that step
        gc.collect()
        # memory that waits for other streams' work can't be looked after while recording; and what the function's first
        # run left cached is of no use to a pool
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            # other threads, such as a tracker's, may do as they like
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = body()
            except BaseException:
                self._abandon(graph)
                raise
            try:
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.alive.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave a recording that failed: the stream, and then the allocator, go back to what they did before."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):
            # where the driver refused the end, the allocator was not told of it
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
