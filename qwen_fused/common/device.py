"""The device that a run is on, and the way back from it."""

from __future__ import annotations

import torch
from torch import Tensor


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means; auto takes CUDA when there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        got = "no visible GPU" if torch.version.cuda else f"torch {torch.__version__}, which is built for the CPU"
        raise ValueError(f"device cuda needs a CUDA build of torch and a visible GPU, got {got}; pass --device cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {name!r}")
    return torch.device(name)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def to_host(values: Tensor) -> Tensor:
    """A copy on the host, on its way: complete once an event recorded later has passed."""
    if values.device.type != "cuda":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
