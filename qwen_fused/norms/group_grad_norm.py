"""Per-group gradient norms: every gradient is read once, nothing waits for the device, and a bad tensor has a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused import backends
from qwen_fused.common.device import to_host
from qwen_fused.norms import reference, sharded

Tensors = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

if backends.has_op("group_grad_norm"):

    @torch.library.register_fake("qwen_fused::group_grad_norm")
    def _(
        grads: list[Tensor], rows: list[int], position: Any, inv_scale: float, inv_scale_tensor: Any
    ) -> tuple[Tensor, Tensor]:
        reference.check(grads)
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        # without a gradient it is the scalar that brought the call here
        like = grads[0] if grads else inv_scale_tensor
        values = like.new_empty((3, len(rows) // 3), dtype=dtype)
        return values, values.new_empty((2, len(rows) // 3), dtype=torch.int64)

    @torch.library.register_fake("qwen_fused::group_grad_clip_")
    def _(grads: list[Tensor], rows: list[int], values: Tensor, max_norm: list[float]) -> None:
        reference.check(grads)
        return None


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
    """

    columns: tuple[str, ...]
    count: int
    values: Tensor  # [3, R]
    counts: Tensor  # [2, R]
    tensors: Mapping[str, Sequence[str]]

    @property
    def norm(self) -> Tensor:
        """[G] L2 norm of inv_scale * gradient; float64 where a gradient is, else float32."""
        return self.values[0, : self.count]

    @property
    def max_abs(self) -> Tensor:
        """[G] largest |inv_scale * gradient|."""
        return self.values[1, : self.count]

    @property
    def nonfinite(self) -> Tensor:
        """[G] int64 number of NaN and Inf among the gradients' own elements."""
        return self.counts[0, : self.count]

    @property
    def first_nonfinite(self) -> Tensor:
        """[G] int64 place in the group's parameter list of the first tensor with a NaN or Inf, or -1."""
        return self.counts[1, : self.count]

    def to_dict(self) -> dict[str, dict[str, float | int | str | None]]:
        """Every group's and part's numbers on the host: the only call that waits for the device.

        Returns:
            Name -> norm, max_abs, nonfinite, first_nonfinite, and tensor: the first bad tensor's name or None.
        """
        return self._unpack(self._pack().cpu())

    def read_later(self) -> PendingStats:
        """Start the copy to the host without waiting for it; `result()` of what comes back waits, `ready()` asks."""
        packed = self._pack()
        if packed.device.type != "cuda":
            return PendingStats(self, packed, None)
        host, event = to_host(packed), torch.cuda.Event()
        event.record()
        return PendingStats(self, host, event)

    def _pack(self) -> Tensor:
        return torch.cat([self.values.reshape(-1).view(torch.uint8), self.counts.reshape(-1).view(torch.uint8)])

    def _unpack(self, packed: Tensor) -> dict[str, dict[str, float | int | str | None]]:
        split = self.values.numel() * self.values.element_size()
        norm, max_abs, _ = packed[:split].view(self.values.dtype).reshape(3, -1).tolist()
        nonfinite, first = packed[split:].clone().view(torch.int64).reshape(2, -1).tolist()
        report = {}
        for column, name in enumerate(self.columns):
            report[name] = {
                "norm": norm[column],
                "max_abs": max_abs[column],
                "nonfinite": nonfinite[column],
                "first_nonfinite": first[column],
                "tensor": self.tensors[name][first[column]] if first[column] >= 0 else None,
            }
        return report


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

    def ready(self) -> bool:
        """Whether `result()` would return at once."""
        return self.event is None or self.event.query()

    def result(self) -> dict[str, dict[str, float | int | str | None]]:
        """As `GradStats.to_dict`; waits for this measurement alone, not for what was launched after it."""
        if self.event is not None:
            self.event.synchronize()
        return self.stats._unpack(self.packed)


def nonfinite_message(report: Mapping[str, Mapping[str, float | int | str | None]]) -> str | None:
    """The sentence to stop a run with, or None when every gradient is finite.

    Args:
        report: as `GradStats.to_dict` returns it.
    """
    # a part says no more than its group does
    wholes = {name: row for name, row in report.items() if name.partition("/")[0] not in report or "/" not in name}
    bad = [(name, row) for name, row in wholes.items() if row["nonfinite"]]
    if not bad:
        return None
    found = "; ".join(f"{row['nonfinite']} NaN or Inf in group {name}, first in {row['tensor']}" for name, row in bad)
    return f"the gradient is not finite: {found}"


def _call(name: str, reference: Callable, grads: Sequence[Tensor], *rest: Any) -> Any:
    """The compiled op where it was built for the gradients' device, else the reference."""
    if backends.has_kernel(name, grads[0].device.type):
        try:
            return getattr(torch.ops.qwen_fused, name).default(grads, *rest)
        except NotImplementedError:
            # a gradient further on is on a device without a kernel: the reference refuses it in words
            pass
    return reference(grads, *rest)


class GroupGradNorm:
    """L2 norm, largest element and NaN/Inf count of each group's gradients, in one read of all of them.

    The norm is sqrt(Σ (inv_scale · g)²) over every element of the group's gradients, as
    `torch.nn.utils.get_total_norm` has it, accumulated in float32 (float64 for float64) and repeatable bit for bit.
    Parameters of any shape; those without a gradient are skipped. DTensors are measured whole: a collective.

    Args:
        groups: name -> a module, its parameters, or (name, parameter) pairs as `named_parameters()` gives; or a
            mapping of such, whose parts are then measured too, at no further cost.

    Raises:
        ValueError: a parameter appears twice, or a group is no list of parameters.
    """

    def __init__(self, groups: Mapping[str, Tensors | Mapping[str, Tensors]]):
        if not isinstance(groups, Mapping):
            raise ValueError(f"groups must map names to parameters, got a {type(groups).__name__}")
        self.groups: tuple[str, ...] = tuple(groups)
        self.parameters: list[Tensor] = []
        self.tensors: dict[str, list[str]] = {}
        ranges: dict[str, tuple[int, int]] = {}
        parts: dict[str, tuple[int, int]] = {}
        for group, members in groups.items():
            begin = len(self.parameters)
            self.tensors[group] = []
            if isinstance(members, Mapping):
                for part, part_members in members.items():
                    part_begin = len(self.parameters)
                    names = self._append(f"{group}/{part}", part_members)
                    self.tensors[group] += names
                    parts[f"{group}/{part}"] = (part_begin, len(self.parameters))
            else:
                self._append(group, members)
            ranges[group] = (begin, len(self.parameters))
        self._refuse_repeats()
        self._ranges = [*ranges.values(), *parts.values()]
        self._columns = (*ranges, *parts)
        self._all_rows = [number for begin, end in self._ranges for number in (begin, end, begin)]

    def _append(self, name: str, members: Tensors) -> list[str]:
        if isinstance(members, nn.Module):
            members = members.named_parameters()
        if isinstance(members, (Tensor, str)) or not isinstance(members, Iterable):
            raise ValueError(f"group {name} must be a list of parameters, got a {type(members).__name__}")
        names = self.tensors[name] = []
        for place, member in enumerate(members):
            label, parameter = member if isinstance(member, tuple) else (f"{name}[{place}]", member)
            if not isinstance(parameter, Tensor):
                raise ValueError(f"group {name} must hold parameters, got {type(parameter).__name__} at {place}")
            self.parameters.append(parameter)
            names.append(label)
        return names

    def _refuse_repeats(self) -> None:
        seen: dict[int, str] = {}
        labels = [label for group in self.groups for label in self.tensors[group]]
        for label, parameter in zip(labels, self.parameters, strict=True):
            first = seen.setdefault(id(parameter), label)
            if first is not label:
                raise ValueError(f"each parameter must be in one group once, got {label} again after {first}")

    @torch.no_grad()
    def measure(self, inv_scale: float | Tensor | None = None) -> GradStats:
        """Measure the gradients that the parameters hold now.

        Args:
            inv_scale: what to multiply the gradients with, 1 / the loss scale: a number, or a tensor of one element on
                the gradients' device. Norm and max_abs are of the product; NaN and Inf are counted before it.

        Returns:
            GradStats on the gradients' device. A finite gradient whose square leaves float32's range still has a finite
            norm; where an element is not finite, the norm is Inf or NaN as the element is.

        Raises:
            ValueError: the gradients lie on several devices, are sparse, or are not float16, bfloat16, float32 or
                float64.
        """
        grads, rows, position = self._gather(self._ranges, self._all_rows)
        factor, factor_tensor = (1.0, inv_scale) if isinstance(inv_scale, Tensor) else (inv_scale, None)
        factor = 1.0 if factor is None else float(factor)
        mesh = sharded.mesh_of(grads)
        if mesh is None:
            values, counts = self._measure(grads, rows, position, factor, factor_tensor)
        else:
            # ranks may hold different kinds of gradients: they must agree on the type of the result
            wide = any(grad.dtype == torch.float64 for grad in grads)
            share = sharded.local_share(grads, rows, position, mesh)
            values, counts = self._measure(*share, factor, factor_tensor)
            values = values.to(torch.float64 if wide else torch.float32)
            values, counts = sharded.combine(values, counts, mesh)
        return GradStats(self._columns, len(self.groups), values, counts, self.tensors)

    @torch.no_grad()
    def clip_(self, stats: GradStats, max_norm: float | Mapping[str, float]) -> None:
        """Scale each group's gradients in place by inv_scale * min(1, max_norm / (norm + 1e-6)), where that is not 1.

        The rule is `torch.nn.utils.clip_grad_norm_`'s, per group, and the unscaling of `measure` is part of it.

        Args:
            stats: what `measure` found for the gradients as they are now.
            max_norm: one bound for every group, or name -> bound, in the unit of `GradStats.norm`; a group left out is
                unscaled and not clipped.

        Raises:
            ValueError: a bound is negative or no number, or for a group that there is not.
        """
        if isinstance(max_norm, Mapping):
            unknown = set(max_norm) - set(self.groups)
            if unknown:
                raise ValueError(f"max_norm must name groups among {list(self.groups)}, got {sorted(unknown)}")
            bounds = [max_norm.get(group, math.inf) for group in self.groups]
        else:
            bounds = [max_norm] * max(len(self.groups), 1)
        if any(not isinstance(bound, Real) or not bound >= 0 for bound in bounds):
            raise ValueError(f"max_norm must be a number of at least 0, or such a number per group, got {max_norm!r}")
        bounds = [float(bound) for bound in bounds[: len(self.groups)]]
        count = len(self.groups)
        grads, rows, _ = self._gather(self._ranges[:count], self._all_rows[: 3 * count])
        if not grads:
            return
        _call("group_grad_clip_", reference.clip_, sharded.local(grads), rows, stats.values, bounds)

    def _gather(self, ranges: list[tuple[int, int]], rows: list[int]) -> tuple[list[Tensor], list[int], list[int]]:
        """The gradients there are, the rows over them, and their places in the full list (empty: all of them)."""
        grads = [parameter.grad for parameter in self.parameters]
        present = [grad for grad in grads if grad is not None]
        if len(present) == len(grads):
            return present, rows, []
        before = [0]
        for grad in grads:
            before.append(before[-1] + (grad is not None))
        rows = [number for begin, end in ranges for number in (before[begin], before[end], begin)]
        return present, rows, [place for place, grad in enumerate(grads) if grad is not None]

    def _measure(
        self, grads: list[Tensor], rows: list[int], position: list[int], factor: float, factor_tensor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not grads:
            return self._nothing(rows, factor, factor_tensor)
        return _call("group_grad_norm", reference.measure, grads, rows, position, factor, factor_tensor)

    def _nothing(self, rows: list[int], factor: float, factor_tensor: Tensor | None) -> tuple[Tensor, Tensor]:
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        values = torch.zeros(3, len(rows) // 3, device=device)
        values[2] = factor if factor_tensor is None else factor * factor_tensor.reshape(())
        counts = torch.zeros(2, len(rows) // 3, dtype=torch.int64, device=device)
        counts[1] = -1
        return values, counts
