"""How the Triton loss is launched: cells per program and warps, by what was measured, for each GPU.

A row holds for its compute capability and, until one of its own is there, for those above it. `bench/tune_efe_loss.py`
measures the candidates on a device and prints rows to paste here. Nothing is tuned while a program runs.

Pipeline stages are no choice here: a loop without a matrix product has none, and the kernels' PTX for sm_90 is the same
with one and with three.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Options of a kernel's launch."""

    cells: int  # of one episode per program, a power of two
    warps: int


class Row(NamedTuple):
    """What holds for up to so many classes."""

    classes: int
    forward: Launch
    backward: Launch
    measured: str


# two cells a thread leave room in its registers for ten classes of plan, back and preference; one warp needs no shared
# memory for its sums
AHEAD = (
    "registers and spills, compiled ahead of time for sm_80, 90, 100 and 120; on an H200 the forward kernel of ten "
    "classes at B = 32, against five others"
)
TABLE: dict[int, tuple[Row, ...]] = {
    80: (
        Row(4, Launch(64, 1), Launch(64, 1), AHEAD),
        Row(64, Launch(32, 1), Launch(32, 1), AHEAD),
    ),
}


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability, as 90 for 9.0; the table's lowest for a CPU, where the kernels are interpreted."""
    if device.type != "cuda":
        return min(TABLE)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_row(classes: int, capability: int) -> Row:
    """The row for a device: of the nearest capability below, or of the lowest."""
    known = max((c for c in TABLE if c <= capability), default=min(TABLE))
    return next(row for row in TABLE[known] if classes <= row.classes)
