"""Launches of compiled Triton kernels past Triton's own launcher.

Triton looks at every argument of every launch, to see what it may specialise a kernel for, and makes strings of what it
finds: more time than a small kernel takes. The kernels here specialise nothing by themselves. What one was compiled for
are the types of its pointers and its constants, which are the key; whatever else is worth knowing is a constant too.
Numbers in a tuple Triton specialises whatever it is told, for 1 and for multiples of 16: strides travel as 4 s + 2,
which is neither, and kernels take them apart (`unpacked` in efe_tile.py).

The first launch of a key is Triton's, later ones call what it compiled. That asks for some of Triton's internals: where
the line that launches is not the one known here, where a profiler hooks launches, and under the interpreter, Triton
launches as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

INTERPRETED = triton.knobs.runtime.interpret
# every integer is passed as an int32; a kernel that needs more was compiled for it by Triton
INT32 = 2**31

LAUNCH = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
)


def _why_not_direct() -> str | None:
    """What of Triton is not as known; None where launches may go past it."""
    try:
        source = "".join(inspect.getsource(JITFunction.run).split())
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    if LAUNCH not in source:
        return f"Triton {triton.__version__} launches in a way that is not known here"
    return None


NOT_DIRECT = _why_not_direct()
_runtime = triton.knobs.runtime


def _is_hooked() -> bool:
    """Whether somebody is told of launches: in one of Triton's chains, or by a function in place of one."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def jit_unspecialized(*aligned: str) -> Callable[[Callable], Any]:
    """Jit a kernel that knows no more of its arguments than types and constants, but that these begin at 16 bytes."""

    def jit(function: Callable) -> Any:
        parameters = inspect.signature(function).parameters.items()
        known = {name for name, parameter in parameters if parameter.annotation is tl.constexpr} | {*aligned}
        return triton.jit(do_not_specialize=[name for name, _ in parameters if name not in known])(function)

    return jit


class Kernel:
    """A jitted kernel whose arguments are pointers, then numbers and tuples of integers, then constants.

    It must have been made by `jit_unspecialized`, and have types on its numbers.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self.compiled: dict[tuple, tuple] = {}

    def __call__(
        self,
        blocks: int,
        pointers: Sequence[Tensor | None],
        strides: Sequence[Sequence[int] | None],
        numbers: Sequence[int | float],
        constants: tuple,
        warps: int,
    ) -> None:
        """Launch on the current stream of the current device, where the pointers must be.

        Args:
            blocks: programs, in one dimension.
            pointers: tensors, None where there is none.
            strides: tuples of integers, None where the tensor is none.
            numbers: the rest of the arguments.
            constants: of the kernel, in its order.
            warps: of a program.
        """
        index = pointers[0].get_device()  # type: ignore[union-attr]
        key = (index, warps, constants, *[None if x is None else x.dtype for x in pointers])
        found = self.compiled.get(key)
        strides = [None if own is None else tuple([4 * s + 2 for s in own]) for own in strides]
        wide = max(chain.from_iterable(filter(None, strides)), default=0) >= INT32
        if found is None or wide or _is_hooked():
            made = self.jitted[(blocks,)](
                *pointers, *strides, *numbers, *constants, num_warps=warps, enable_fp_fusion=True
            )
            if made is not None and not wide and NOT_DIRECT is None:
                # with what owns the function: Triton unloads it when its own cache lets go of the kernel
                self.compiled[key] = made.run, made.function, made.packed_metadata, made
            return
        run, function, packed, _ = found
        stream = triton.runtime.driver.active.get_current_stream(index)
        # an address costs less than a tensor that is asked for it
        addresses = [None if x is None else x.data_ptr() for x in pointers]
        run(blocks, 1, 1, stream, function, packed, None, None, None, *addresses, *strides, *numbers, *constants)
