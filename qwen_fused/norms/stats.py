"""What one measurement of gradients found: on the device, on its way to the host, and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.device import to_host

Report = dict[str, dict[str, float | int | str | None]]


@dataclass(frozen=True)
class GradStats:
    """What one measurement found, still on the device.

    Args:
        columns: what was measured, R names: first the G groups, in order, then "group/part" for each part of a group
            that was given as a mapping of parts.
        count: G, the number of groups.
        values: [3, R] float: norm and max_abs, in the gradients' own unit, and inv_scale.
        counts: [2, R] int64: nonfinite, first_nonfinite.
        tensors: name in `columns` -> names of its tensors.
        written: grows when `clip_` writes to what was measured, so that the same stats don't scale it twice.
        measured: what tells whether the gradients are still those; None where nothing does, as after pickling.
    """

    columns: tuple[str, ...]
    count: int
    values: Tensor  # [3, R]
    counts: Tensor  # [2, R]
    tensors: Mapping[str, Sequence[str]]
    written: list[bool] = field(default_factory=list, repr=False)
    measured: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "measured": None}

    @property
    def norm(self) -> Tensor:
        """[G] L2 norm of inv_scale * gradient; float64 where a gradient is, else float32."""
        return self.values[0, : self.count]

    @property
    def max_abs(self) -> Tensor:
        """[G] largest |inv_scale * gradient|: the inf-norm of `clip_grad_norm_(norm_type=inf)`."""
        return self.values[1, : self.count]

    @property
    def nonfinite(self) -> Tensor:
        """[G] int64 number of NaN and Inf among the gradients' own elements."""
        return self.counts[0, : self.count]

    @property
    def first_nonfinite(self) -> Tensor:
        """[G] int64 place in the group's parameter list of the first tensor with a NaN or Inf, or -1."""
        return self.counts[1, : self.count]

    def to_dict(self) -> Report:
        """Every group's and part's numbers on the host: the only call that waits for the device.

        Returns:
            Name -> norm, max_abs, nonfinite, first_nonfinite, and tensor: the first bad tensor's name or None.
        """
        if self.values.is_cpu:
            return self._report(self.values, self.counts)
        return self._unpack(self._pack().cpu())

    def read_later(self) -> PendingStats:
        """Start the copy to the host without waiting for it; `result()` of what comes back waits for it alone."""
        packed = self._pack()
        if packed.device.type != "cuda":
            return PendingStats(self, packed, None)
        host, event = to_host(packed), torch.cuda.Event()
        event.record()
        return PendingStats(self, host, event)

    def _pack(self) -> Tensor:
        return torch.cat([self.values.reshape(-1).view(torch.uint8), self.counts.reshape(-1).view(torch.uint8)])

    def _unpack(self, packed: Tensor) -> Report:
        split = self.values.numel() * self.values.element_size()
        values = packed[:split].view(self.values.dtype).reshape(3, -1)
        return self._report(values, packed[split:].clone().view(torch.int64).reshape(2, -1))

    def _report(self, values: Tensor, counts: Tensor) -> Report:
        norm, max_abs, _ = values.tolist()
        nonfinite, first = counts.tolist()
        return {
            name: {
                "norm": norm[column],
                "max_abs": max_abs[column],
                "nonfinite": nonfinite[column],
                "first_nonfinite": first[column],
                "tensor": self.tensors[name][first[column]] if first[column] >= 0 else None,
            }
            for column, name in enumerate(self.columns)
        }


@dataclass(frozen=True)
class PendingStats:
    """A `GradStats` on its way to the host.

    Args:
        stats: what was measured.
        packed: [bytes] uint8 on the host: its values, then its counts.
        event: passed once `packed` is whole; None where nothing had to be copied.
    """

    stats: GradStats
    packed: Tensor
    event: torch.cuda.Event | None

    def result(self) -> Report:
        """As `GradStats.to_dict`; waits for this measurement alone, not for what was launched after it."""
        if self.event is not None:
            self.event.synchronize()
        return self.stats._unpack(self.packed)


def nonfinite_message(report: Mapping[str, Mapping[str, float | int | str | None]]) -> str | None:
    """The sentence to stop a run with, or None when every gradient is finite.

    Args:
        report: as `GradStats.to_dict` returns it.
    """
    bad = {name: row for name, row in report.items() if row["nonfinite"]}
    # a part says no more than its group does
    wholes = {name: row for name, row in bad.items() if not any(name.startswith(f"{group}/") for group in bad)}
    if not wholes:
        return None
    found = "; ".join(
        f"{row['nonfinite']} NaN or Inf in group {name}, first in {row['tensor']}" for name, row in wholes.items()
    )
    return f"the gradient is not finite: {found}"


def refuse_nonfinite(report: Mapping[str, Mapping[str, float | int | str | None]]) -> None:
    """Raise RuntimeError where a gradient has a NaN or Inf, or a norm leaves the range, naming group and tensor."""
    message = nonfinite_message(report)
    if message is not None:
        raise RuntimeError(message)
    for name, row in report.items():
        if row["norm"] == math.inf:
            raise RuntimeError(f"the gradient's norm leaves its range: group {name} has norm {row['norm']}")
