"""Which implementation of the loss runs, and the one place that calls it.

"auto" takes C++ on the CPU and Triton on CUDA, each where it is there. Triton holds a cell's classes in registers, and
above TRITON_CLASSES it compiles for minutes and spills: there "auto" takes plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_fused import backends
from qwen_fused.kernels.reference import efe_loss_reference
from qwen_fused.loss import transforms
from qwen_fused.loss.autograd import ARGUMENTS, HARD_MODE, register_autograd, register_fakes

# asked once: torch.compile can't ask
COMPILED = backends.has_kernel("efe_loss", "cpu")
if COMPILED:
    register_fakes("efe_loss")
if backends.HAS_TRITON:
    # registers the op with a node in Python, and its backward
    from qwen_fused.kernels import efe_loss as triton_loss

    register_fakes("efe_loss_triton")
    register_autograd("efe_loss_triton")
    ON_CUDA = triton_loss.implement("CUDA") if COMPILED else None

BACKENDS = ("auto", "triton", "cpp", "reference")
TRITON_CLASSES = 16


def resolve_backend(backend: str, plan: Tensor, classes: int) -> str:
    """Name of the implementation to run; "auto" picks the fastest that serves the device of `plan` and the classes."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = plan.device.type
    if backend == "auto":
        if device == "cpu":
            return "cpp" if COMPILED else "reference"
        triton = device == "cuda" and backends.HAS_TRITON and classes <= TRITON_CLASSES
        return "triton" if triton else "reference"
    if backend == "cpp" and not (COMPILED and device == "cpu"):
        reason = f"plan_logits on {plan.device}" if COMPILED else f"none: {backends.EXTENSION_ERROR}"
        raise ValueError(f"backend='cpp' must have the compiled extension and CPU tensors, got {reason}")
    if backend == "triton":
        if not backends.HAS_TRITON:
            raise ValueError(f"backend='triton' must have Triton, got none: {backends.TRITON_ERROR}")
        if device != "cuda" and not (device == "cpu" and triton_loss.INTERPRETED):
            raise ValueError(
                "backend='triton' must have CUDA tensors, or CPU tensors and TRITON_INTERPRET=1 in the environment, "
                f"got plan_logits on {plan.device}"
            )
    return backend


def run_reference(inputs: dict[str, Tensor | None], weights: dict[str, float], **options: Any) -> tuple:
    """What `efe_loss_reference` returns."""
    return efe_loss_reference(**inputs, weights=weights, **options)  # type: ignore[arg-type]


def run_op(
    backend: str,
    inputs: dict[str, Tensor | None],
    on: list[bool],
    weights: list[float],
    *,
    hard_floor: float,
    hard_mode: str,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """What the op of a fused backend returns: loss, terms [B, 8], solved, predicted, and what backward needs.

    Args:
        backend: "cpp" or "triton".
        inputs: name in the schema -> tensor; what no term reads is None, so that its dtype, and whether it wants a
            gradient, are no matter.
        on: whether each of TERMS counts, by `active_terms`.
        weights: of each of TERMS.
        hard_floor, hard_mode, ignore_index: as in `efe_loss`.
    """
    annealed = None
    if torch.compiler.is_compiling():
        # a graph holds the numbers that it was traced with: in a tensor they may change from call to call
        plan = inputs["plan"]
        assert plan is not None
        one = torch.ones((), dtype=torch.float64, device=plan.device)
        annealed = torch.stack([one * number for number in (*weights, hard_floor)])
        weights, hard_floor = [0.0] * len(weights), 0.0
    # in the order of the schema, as torch takes a third of a small call to find arguments by their names
    tensors = (*[inputs[name] for name in ARGUMENTS], annealed)
    options = (on, weights, hard_floor, HARD_MODE[hard_mode], ignore_index)
    on_cuda = inputs["plan"].is_cuda  # type: ignore[union-attr]
    name = "efe_loss" if backend == "cpp" or (COMPILED and on_cuda) else "efe_loss_triton"
    if transforms.active():
        return transforms.call(name, tensors, options)
    return getattr(torch.ops.qwen_fused, name)(*tensors, *options)
