"""What torch's functions do to a gradient: tables that tell one kind of cut from another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.labels import tensors_in

# calls whose result is no tensor: the trail of a value ends there
DEPARTURES = {
    "item": "item",
    "__float__": "item",
    "__int__": "item",
    "__index__": "item",
    "__complex__": "item",
    "__bool__": "branch",
    "is_nonzero": "branch",
    "equal": "branch",
    "allclose": "branch",
    "tolist": "tolist",
    "numpy": "numpy",
    "__array__": "numpy",
    "__dlpack__": "numpy",
    "__format__": "text",
    "__repr__": "text",
    "data_ptr": "pointer",
}
# read through raw memory where no mode looks
COPIES_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.__deepcopy__}
# autograd connects them, with a gradient of zero everywhere
ZERO_GRADIENT = {
    name + suffix
    for name in ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "bernoulli", "floor_divide")
    for suffix in ("", "_")
} | {"heaviside", "__floordiv__", "__round__"}
# torch's own functions whose backward stands in for their forward's derivative: straight-through, implicit, or along
# a draw that is made inside
SURROGATES = {
    "gumbel_softmax",
    "rrelu",
    "rrelu_",
    "_standard_gamma",
    "_sample_dirichlet",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "fused_moving_avg_obs_fake_quant",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
}
# whose sixth argument has them divide each row's gradient by how often it was looked up
LOOKUPS = ("embedding", "embedding_bag")
# draws: another floating-point type may draw other numbers
RANDOM = {
    name + suffix
    for name in ("rand", "randn", "randint", "normal", "uniform", "bernoulli", "exponential", "random", "multinomial")
    for suffix in ("", "_", "_like")
} | {"randperm", "rand_like", "poisson", "cauchy_", "log_normal_", "geometric_"}
_ARGMAX = {"argmax", "argmin", "argsort", "max", "min", "topk", "sort", "kthvalue", "mode", "median", "multinomial"}
_COMPARISON = {"eq", "ne", "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal", "not_equal"} | {
    "isclose",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "logical_and",
    "logical_or",
}
_CAST = {"to", "type", "long", "int", "short", "byte", "char", "bool", "type_as", "view"}
STOPS = ("detach", "detach_", "data.__get__")
_SELF_DESCRIBING = {"detach": "detach", "detach_": "detach", "data.__get__": "data"}
# kinds of a cut that somebody wrote down
WRITTEN = ("detach", "no_grad", "decorated no_grad", "inference_mode", "requires_grad", "data")
_SWITCHES = {
    "no_grad": "torch.no_grad",
    "decorated no_grad": "@torch.no_grad",
    "inference_mode": "torch.inference_mode",
}
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "all_gather_into_tensor",
    "reduce_scatter_base": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
}
_BUILTIN = {"aten", "prims", "prim", "higher_order", "profiler", "inductor", "c10d", "_c10d_functional"}


def name_of(func: Any) -> str:
    """Name of a function that torch's function mode hands over; attributes read "data.__get__"."""
    name = getattr(func, "__name__", None) or str(func)
    if name in ("__get__", "__set__"):
        return f"{getattr(func.__self__, '__name__', '?')}.{name}"
    return name


def of_cut(func: Any, name: str, dead: Tensor | None) -> str:
    """Kind of the cut made by a call with the given result; "no_grad" for whichever mode switched gradients off."""
    if dead is None:
        return name
    if name in _SELF_DESCRIBING:
        return _SELF_DESCRIBING[name]
    if func in COPIES_VALUES:
        return "new tensor"
    if not is_inexact(dead):
        plain = name.strip("_")
        for kind, names in (("argmax", _ARGMAX), ("comparison", _COMPARISON), ("integer cast", _CAST)):
            if plain in names:
                return kind
        return "non-differentiable"
    if not torch.is_grad_enabled():
        return "no_grad"
    if isinstance(func, type):
        return "checkpoint" if recomputes(func) else "custom function"
    return "non-differentiable"


def describe(func: Any, name: str, kind: str) -> str:
    """How the user wrote the operation."""
    if kind in _SWITCHES:
        return _SWITCHES[kind]
    if isinstance(func, type) or func is None:
        return name
    if name.endswith(".__get__"):
        return f"Tensor.{name.removesuffix('.__get__')}"
    owner = getattr(func, "__objclass__", None)
    if owner is not None or func in (Tensor.new_tensor, Tensor.__deepcopy__):
        return f"Tensor.{name}"
    return f"torch.{name}"


def discrete_among(name: str, ins: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
    """Results that may jump, or be drawn anew, when they are computed in another floating-point type.

    Of a pair such as a maximum and its index it is the index alone: the maximum is differentiated.
    """
    if name in RANDOM or name in ZERO_GRADIENT:
        return outs
    return [t for t in outs if not is_inexact(t)] if any(is_inexact(t) for t in ins) else []


def is_inexact(tensor: Tensor) -> bool:
    """Whether it holds floating-point or complex numbers, which a gradient can flow through."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_surrogate(func: Any, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether it is a function of torch's own whose backward is meant to be another than its forward's derivative."""
    if name in SURROGATES or (name in LOOKUPS and (kwargs.get("scale_grad_by_freq") or any(args[5:6]))):
        return True
    return isinstance(func, type) and func.__module__.startswith(("torch.distributions.", "torch.ao."))


def recomputes(cls: type) -> bool:
    """Whether a custom Function is reentrant checkpointing, which delivers gradients by a backward pass of its own."""
    return cls.__name__ == "CheckpointFunction"


@cache
def is_custom(func: Any) -> bool:
    """Whether a function is an operation registered by somebody other than torch."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace not in _BUILTIN
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.split("::")[0] not in _BUILTIN
    return False


@cache
def ignores_values(func: Any) -> bool:
    """Whether an aten operation looks at its inputs' shape and type only."""
    name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)
    return name.endswith("_like") or name.startswith("new_") or name in ("empty", "sym_size", "sym_stride")


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    arguments = enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def is_collective(func: Any) -> bool:
    """Whether an aten-level operation is one of torch.distributed's that writes what it gathers into its arguments."""
    return isinstance(func, torch._ops.OpOverload) and func.namespace == "c10d" and "barrier" not in func.__name__


def collective_name(func: Any) -> str:
    """How the user wrote it."""
    name = func.overloadpacket.__name__.strip("_")
    return f"torch.distributed.{_COLLECTIVES.get(name, name)}"


def written_by(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Tensors that an aten operation wrote into."""
    for place, name in _writes(func):
        yield from tensors_in(args[place] if place < len(args) else kwargs.get(name))
