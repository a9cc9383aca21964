"""Compute a loss function in another floating-point type than it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof.kinds import is_inexact
from qwen_fused.proof.labels import is_wrapped
from qwen_fused.proof.moves import Values

_VIEWS = ("T", "mT", "H", "mH", "real", "imag", "data")
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
# what is asked of the tensor and not of its values: where it lies, how it is laid out
_OF_THE_TENSOR_ITSELF = {
    "data_ptr",
    "storage",
    "untyped_storage",
    "storage_offset",
    "stride",
    "size",
    "numel",
    "dim",
    "is_contiguous",
    "register_hook",
    "retain_grad",
}
# type -> the real one that it is as wide as
_REAL = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
# methods that cast to a type by their own name
CASTS = {"float", "half", "bfloat16"}


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The floating-point type of a complex number's parts; a real type is its own."""
    return _REAL.get(dtype, dtype)


def grouped_mm(rows: Tensor, matrices: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Plain form of `torch._grouped_mm` for types that it has no kernel for: each group of rows by its own matrix."""
    if offs is None or rows.dim() != 2 or matrices.dim() != 3:
        raise NotImplementedError("grouped_mm of this layout has no form in another type")
    ends = offs.tolist()
    parts = [rows[start:end] @ matrices[n] for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[2])])


# functions without a kernel for float64, and what takes their place there
PLAIN_FORMS = {"_grouped_mm": grouped_mm, "grouped_mm": grouped_mm}


def _cast(tensor: Tensor, wide: torch.dtype) -> Tensor:
    return tensor.to(_COMPLEX.get(wide, tensor.dtype) if tensor.is_complex() else wide)


@dataclass(frozen=True)
class Upcast:
    """Compute in a wider type, with parameters at exact values.

    Every floating-point and complex argument of every call is converted, and so is every such type that is asked for
    by name. Autocast leaves float64 alone. What is written in place keeps its type. A leaf that the loss function may
    differentiate by has one twin in the wider type, so that its gradient is in that type too.

    Args:
        dtype: the type to compute in.
        values: id of a parameter -> its value in that type, made when it is used.
        differentiates: whether the loss function differentiates by its parameters, which then get twins.
    """

    dtype: torch.dtype
    values: Values
    differentiates: bool = False
    _twins: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def arguments(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call's arguments, converted."""
        if (
            name in _OF_THE_TENSOR_ITSELF
            or name.endswith(".__set__")
            or (name.endswith(".__get__") and name.split(".")[0] not in _VIEWS)
        ):
            return args, kwargs
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _WRITES
        if name == "embedding" and self._may_look_up(args, kwargs):
            # of a table with a hundred thousand rows a few are asked for
            rows, index = args[0].unique(return_inverse=True)
            return (index, self.values[id(args[1])].rows(rows)), kwargs | {"padding_idx": None}
        target = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        out = kwargs.get("out")
        target = out if target is None and isinstance(out, Tensor) else target
        wide = real_type(target.dtype) if target is not None and is_inexact(target) else self.dtype

        def convert(node: Any) -> Any:
            if isinstance(node, Tensor):
                if node is target or not is_inexact(node):
                    return node
                if node.is_leaf and node.requires_grad and wide is self.dtype:
                    return self._of_leaf(node)
                if id(node) in self.values and node.is_leaf:
                    # told to ask for no gradient meanwhile, it is a constant to autograd
                    return _cast(self.values[id(node)].base, wide)
                return _cast(node, wide)
            if isinstance(node, torch.dtype):
                return self.widened(node)
            if type(node) in (list, tuple):
                return type(node)(convert(item) for item in node)
            if type(node) is dict:
                return {key: convert(value) for key, value in node.items()}
            return node

        return tuple(convert(a) for a in args), {key: convert(value) for key, value in kwargs.items()}

    def _may_look_up(self, args: tuple, kwargs: dict) -> bool:
        known = len(args) == 2 and id(args[1]) in self.values and not self.differentiates
        return known and kwargs.get("max_norm") is None

    def _of_leaf(self, leaf: Tensor) -> Tensor:
        if is_wrapped(leaf):
            # what torch.func differentiates by can't be made a leaf anew: the one cast of it is differentiated by
            return self._twins.setdefault(id(leaf), (leaf, _cast(leaf, self.dtype)))[1]
        exact = self.values.get(id(leaf))
        if exact is not None and not self.differentiates:
            return _cast(exact(), self.dtype)
        if leaf.dtype in (self.dtype, _COMPLEX.get(self.dtype)):
            return leaf
        if isinstance(leaf, nn.Parameter) and not self.differentiates:
            return _cast(leaf.detach(), self.dtype)
        known = self._twins.get(id(leaf))
        # code may write to the leaf behind autograd's back, as an attack on its input does
        if known is None or not torch.equal(known[1].detach().to(leaf.dtype), leaf.detach()):
            twin = _cast(leaf if exact is None else exact(), self.dtype).detach().clone().requires_grad_()
            known = self._twins[id(leaf)] = leaf, twin
        return known[1]

    def widened(self, dtype: Any) -> Any:
        """The type to take in place of a narrower one that was asked for."""
        real = _REAL.get(dtype)
        if real is None or real.itemsize >= self.dtype.itemsize:
            return dtype
        return self.dtype if real is dtype else _COMPLEX[self.dtype]

    @contextmanager
    def by_default(self) -> Iterator[None]:
        """Make new tensors of this type too."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
