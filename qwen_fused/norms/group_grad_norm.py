"""Per-group gradient norms: every gradient is read once, nothing waits for the device, and a bad tensor has a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_fused import backends
from qwen_fused.norms import reference, sharded
from qwen_fused.norms.bounds import Bound, on_device, read_bounds
from qwen_fused.norms.groups import Tensors, flatten
from qwen_fused.norms.stats import GradStats, refuse_nonfinite

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
    def _(
        grads: list[Tensor], rows: list[int], values: Tensor, max_norm: list[float], bounds: Tensor | None = None
    ) -> None:
        reference.check(grads)
        return None


if backends.HAS_EXTENSION:
    import qwen_fused._C

# an extension that is older can't look at parameters itself
COMPILED: Any = qwen_fused._C if backends.HAS_EXTENSION and hasattr(qwen_fused._C, "measure_gradients") else None


def _has_kernel(name: str, device: str) -> bool:
    """Whether the op is compiled for that kind of device; to torch.compile a constant."""
    return backends.has_kernel(name, device)


# as torch.compiler.assume_constant_result marks it, which takes a second and a half to import torch._dynamo
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_direct() -> bool:
    """Whether the extension may find the gradients itself: torch.compile can't look into it."""
    return not torch.compiler.is_compiling() and COMPILED is not None and _has_kernel("group_grad_norm", "cpu")


def check_scale(inv_scale: object) -> None:
    """Refuse a loss scale that is no number."""
    if inv_scale is None or isinstance(inv_scale, (float, int)):
        return
    if isinstance(inv_scale, Tensor):
        if inv_scale.numel() != 1 or inv_scale.is_complex():
            raise ValueError(f"inv_scale must have one real element, got {inv_scale.dtype} {tuple(inv_scale.shape)}")
    elif not hasattr(inv_scale, "__float__"):
        raise ValueError(f"inv_scale must be a number or a tensor of one element, got {inv_scale!r}")


def _call(name: str, plain: Any, grads: Sequence[Tensor], *rest: Any) -> Any:
    """The compiled op where it was built for the gradients' device, else the reference."""
    if _has_kernel(name, grads[0].device.type):
        try:
            return getattr(torch.ops.qwen_fused, name).default(grads, *rest)
        except NotImplementedError:
            # a gradient further on is on a device without a kernel: the reference refuses it in words
            pass
    return plain(grads, *rest)


class GroupGradNorm:
    """L2 norm, largest element and NaN/Inf count of each group's gradients, in one read of all of them.

    The norm is sqrt(Σ (inv_scale · g)²) over every element of the group's gradients, as
    `torch.nn.utils.get_total_norm` has it, and repeatable bit for bit. Its relative error is at most 4e-7, and 1e-13
    where all of a group's gradients are float64, whatever the elements are and however many: float32 sums are of a few
    squares each, and are added in float64. The inf-norm comes with it, as `GradStats.max_abs`.
    Parameters of any shape; those without a gradient are skipped. They are the ones there are when it is made: a
    parameter that the model replaces later is not found. DTensors are measured whole: a collective.
    `measure` and `clip_` may stand inside `torch.compile(fullgraph=True)`.

    Args:
        groups: name -> a module, its parameters, or (name, parameter) pairs as `named_parameters()` gives; or a
            mapping of such, whose parts are then measured too, at no further cost.
        tied: what to do with a parameter that comes again, in another group, in another part or in the same one:
            "refuse" it, or count it where it comes "first" and leave it out of the rest. Weights that are tied, as a
            language model's embedding and head are, have one gradient and belong to one group:
            `GroupGradNorm({"embedding": model.embed, "head": model.head}, tied="first")`.

    Raises:
        ValueError: a parameter comes again, by identity and not by name; a group is no list of parameters, or an
            iterator that has been read before; a tensor is computed from others, without retain_grad(); or a group has
            the name of another's part.
    """

    def __init__(self, groups: Mapping[str, Tensors | Mapping[str, Tensors]], *, tied: str = "refuse"):
        flat = flatten(groups, tied)
        self.groups: tuple[str, ...] = tuple(flat.groups)
        self.parameters: list[Tensor] = flat.parameters
        self.tensors: dict[str, list[str]] = flat.tensors
        self._ranges = [*flat.groups.values(), *flat.parts.values()]
        self._columns = (*flat.groups, *flat.parts)
        self._all_rows = [number for begin, end in self._ranges for number in (begin, end, begin)]
        # shared with the stats of each measurement since the last clip_
        self._written: list[bool] = []

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
                float64; a parameter without one is on the meta device, and so not the one that is trained; or
                inv_scale is neither.
        """
        check_scale(inv_scale)
        found = remembered = None
        if _is_direct():
            found = COMPILED.measure_gradients(self.parameters, self._all_rows, inv_scale)
        values, counts = found or self._measure_any(inv_scale)
        if COMPILED is not None and not torch.compiler.is_compiling():
            remembered = COMPILED.remember_gradients(self.parameters)
        return GradStats(self._columns, len(self.groups), values, counts, self.tensors, self._written, remembered)

    @torch.no_grad()
    def clip_(
        self, stats: GradStats, max_norm: Bound | Mapping[str, Bound], *, error_if_nonfinite: bool = False
    ) -> None:
        """Scale each group's gradients in place by inv_scale * min(1, max_norm / (norm + 1e-6)), where that is not 1.

        The rule is `torch.nn.utils.clip_grad_norm_`'s, per group, and the unscaling of `measure` is part of it. To
        autograd it is a write, as torch's is: of what is scaled on the CPU, and of every gradient on CUDA, where the
        device alone knows.

        Args:
            stats: what `measure` found for the gradients as they are now.
            max_norm: one bound for every group, or name -> bound, in the unit of `GradStats.norm`; a group left out is
                unscaled and not clipped. A bound may be a tensor on the gradients' device, of one element, or of [G]
                for all groups in order: it is read there, and nothing waits for it, which is how an adaptive bound
                such as `1.5 * running_norm` is given. One that is NaN or below 0 makes the gradients NaN.
            error_if_nonfinite: look at the stats first, which waits for the device, and write nothing where a gradient
                has a NaN or Inf or a norm is Inf.

        Raises:
            ValueError: a bound is negative or no number, or for a group that there is not; stats of another
                GroupGradNorm; gradients share memory, and would be scaled twice.
            RuntimeError: the gradients were scaled since they were measured, by these stats or others; one is another
                tensor or was written to since, where the extension is there to see it; or error_if_nonfinite.
        """
        if stats.tensors is not self.tensors:
            raise ValueError(
                f"stats must be what this GroupGradNorm measured, of {list(self._columns)}, "
                f"got another's, of {list(stats.columns)}"
            )
        if stats.written:
            raise RuntimeError("stats must be measured anew: clip_ has scaled the gradients since these were measured")
        self._check_unchanged(stats)
        numbers, bounds = read_bounds(max_norm, self.groups, stats.values)
        if error_if_nonfinite:
            refuse_nonfinite(stats.to_dict())
        stats.written.append(True)
        self._written = []
        rows = self._all_rows[: 3 * len(self.groups)]
        if _is_direct() and COMPILED.clip_gradients(self.parameters, rows, stats.values, numbers, bounds):
            return
        grads, rows, _ = self._gather(rows)
        if not grads:
            return
        plain = not torch.compiler.is_compiling() and any(grad.is_neg() for grad in grads)
        # torch has no list of gradients written for an op whose sign it keeps aside
        clip = reference.clip_ if plain else partial(_call, "group_grad_clip_", reference.clip_)
        clip(sharded.local(grads), rows, stats.values, numbers, bounds)
        sharded.count_write(grads)

    def _check_unchanged(self, stats: GradStats) -> None:
        """Refuse to scale by the norm of what was there before."""
        if stats.measured is None or torch.compiler.is_compiling():
            return
        place = COMPILED.first_changed_gradient(stats.measured, self.parameters)
        if place < 0:
            return
        name = next(
            f"{self.tensors[group][place - begin]} of group {group}"
            for group, (begin, end) in zip(self.groups, self._ranges, strict=False)
            if begin <= place < end
        )
        raise RuntimeError(
            f"stats must be measured anew: the gradient of {name} is another tensor, or was written to, since it was "
            f"measured"
        )

    def _gather(self, rows: list[int]) -> tuple[list[Tensor], list[int], list[int]]:
        """The gradients there are, the rows over them, and their places in the full list (empty: all of them)."""
        grads = [parameter.grad for parameter in self.parameters]
        present = [grad for grad in grads if grad is not None]
        if len(present) == len(grads):
            return present, rows, []
        if any(parameter.is_meta and parameter.grad is None for parameter in self.parameters):
            raise ValueError(
                "groups must hold parameters that have memory, got some on the meta device: make GroupGradNorm after "
                "the model's to_empty or load_state_dict(assign=True), which put other parameters in their place"
            )
        before = [0]
        for grad in grads:
            before.append(before[-1] + (grad is not None))
        # the third of three is where a row's parameters begin, and stays
        rows = [n if i % 3 == 2 else before[n] for i, n in enumerate(rows)]
        return present, rows, [place for place, grad in enumerate(grads) if grad is not None]

    def _measure_any(self, inv_scale: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """Whatever the gradients are: none, compiled, sharded, of their own class, on a device without a kernel."""
        grads, rows, position = self._gather(self._all_rows)
        factor, factor_tensor = 1.0, None
        if isinstance(inv_scale, Tensor):
            factor_tensor = inv_scale
        elif inv_scale is not None:
            factor = float(inv_scale)
            if torch.compiler.is_compiling() and grads:
                # as an argument of the op a number would be compiled in: one compilation for each
                factor, factor_tensor = 1.0, on_device(factor, grads[0])
        mesh = sharded.mesh_of(grads)
        if mesh is None:
            return self._measure(grads, rows, position, factor, factor_tensor)
        # ranks may hold different kinds of gradients: they must agree on the type of the result
        wide = any(grad.dtype == torch.float64 for grad in grads)
        share = sharded.local_share(grads, rows, position, mesh)
        values, counts = self._measure(*share, factor, factor_tensor)
        return sharded.combine(values.to(torch.float64 if wide else torch.float32), counts, mesh)

    def _measure(
        self, grads: list[Tensor], rows: list[int], position: list[int], factor: float, factor_tensor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not grads:
            return self._nothing(rows, factor, factor_tensor)
        return _call("group_grad_norm", reference.measure, grads, rows, position, factor, factor_tensor)

    def _nothing(self, rows: list[int], factor: float, factor_tensor: Tensor | None) -> tuple[Tensor, Tensor]:
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        values = torch.zeros(3, len(rows) // 3, dtype=torch.float32, device=device)
        values[2] = factor if factor_tensor is None else factor * factor_tensor.reshape(())
        counts = torch.zeros(2, len(rows) // 3, dtype=torch.int64, device=device)
        counts[1] = -1
        return values, counts
