"""A step that is the same launches every time, as a CUDA graph: one launch, whatever is in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen_fused.common.cuda_graphs import CudaGraphs

# a stream's first runs allocate, compile and choose algorithms
WARM_UP = 2
# off, a step is launched piece by piece: to look for what a graph hides
CAPTURE = True


class CapturedStep:
    """A step on one device, captured where that is a CUDA device and run as it is where it is not.

    Args:
        step: reads and writes the same tensors every time, and nothing of them on the host.
        reset: undoes what the warm-up did.
        device: where.
        capture: a capture takes a second or more; for some dozen steps it does not pay.
    """

    def __init__(
        self, step: Callable[[], object], reset: Callable[[], object], device: torch.device, capture: bool = True
    ):
        self.run = step
        if device.type != "cuda" or not (CAPTURE and capture):
            return
        graphs = CudaGraphs(device)
        with torch.cuda.device(device):
            graphs.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(graphs.stream):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(graphs.stream)
            self.run = graphs.record(step)
            # a recording runs nothing: what there is to undo is the warm-up's
            reset()

    def __call__(self) -> None:
        self.run()


class HostRing:
    """Host tensors that are copied to a device again and again, each not written to before its copy is through.

    It also keeps the host from running ahead of the device by more steps than it holds.

    Args:
        shape, dtype: of one of them.
        device: where they go.
        count: how many.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int = 4):
        pinned = device.type == "cuda"
        self.device = device
        self.tensors = [torch.zeros(shape, dtype=dtype, pin_memory=pinned) for _ in range(count)]
        self.events: list[torch.cuda.Event | None] = [None] * count
        self.turn = -1

    def next(self) -> torch.Tensor:
        """The next one to write to."""
        self.turn = (self.turn + 1) % len(self.tensors)
        event = self.events[self.turn]
        if event is not None:
            event.synchronize()
        return self.tensors[self.turn]

    def used(self) -> None:
        """All that reads the last one has been launched."""
        if self.device.type == "cuda":
            event = self.events[self.turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
