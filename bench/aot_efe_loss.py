"""Compile the Triton loss ahead of time for GPUs that need not be there, and print what each kernel takes of one.

    python bench/aot_efe_loss.py [--arch 80 90 100 120] [--dtype float32 bfloat16 float16] [--full]

Every kernel is specialised by its real launcher, on the shapes the trainer uses; a kernel that spills is an error.
Of a warp's memory it says, by sass.py, how many loads and bytes are on their way at most, and how many trips wait for
one another.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

# the kernels are to be compiled, whatever the tests around this do
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from no_device import NoDevice
from sass import read_memory, run_tool

from qwen_fused.kernels import efe_launch, efe_loss

# weights of ce, risk, ambiguity, agreement, anchor and prompt; whether there are step weights; the hard mode
TRAINER = {
    "trainer": ((1.0, 1.0, 0.0, 0.5, 0.2, 0.3), True, 0),
    "cross-entropy": ((1.0, 0.0, 0.0, 0.0, 0.0, 0.0), False, 2),
}
OTHERS = {
    "every term, cell mask": ((1.0, 1.0, 0.1, 0.5, 0.2, 0.3), True, 1),
    "without back": ((1.0, 1.0, 0.0, 0.0, 0.2, 0.3), True, 0),
}
REGISTERS_PER_SM = 65536
# warps and blocks that a multiprocessor holds, by compute capability (CUDA C++ programming guide)
LIMITS = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}


class Recorder:
    """Stands for a kernel: its launches compile and are kept, nothing runs."""

    def __init__(self, kernel, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))


def compile_all(
    weights: tuple[float, ...], steps: bool, hard_mode: int, dtype: torch.dtype, shape=(32, 5, 10, 30, 30)
) -> list:
    """The compiled kernels of one forward and one backward call."""
    B, T, C, H, W = shape
    _, risk, ambiguity, agreement, anchor, prompt = weights
    plan = torch.zeros(shape, dtype=dtype)
    inputs = (
        plan,
        torch.zeros(B, H, W, dtype=torch.long),
        plan.clone() if agreement else None,
        torch.zeros(B, C, H, W) if risk or anchor else None,
        torch.zeros(C, H, W) if anchor else None,
        torch.zeros(C) if ambiguity else None,
        torch.zeros(B, C, dtype=dtype) if prompt else None,
        torch.zeros(T) if steps else None,
        None,
        None,
    )
    on = [weight != 0 for weight in weights]
    options = (on, weights, 0.5, hard_mode, -100)
    compiled: list = []
    # the launches of the architecture that is compiled for
    arch = triton.runtime.driver.active.get_current_device()
    kernels = (efe_loss.FORWARD, efe_loss.FINISH, efe_loss.BACKWARD)
    real = [kernel.jitted for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.jitted = Recorder(kernel.jitted, compiled)
        efe_loss.capability_of = lambda device: arch
        out = efe_loss._forward(*inputs, *options)
        efe_loss._backward(out[0], *inputs, *out[3:], *options, (True,) * 5)
    finally:
        for kernel, jitted in zip(kernels, real, strict=True):
            kernel.jitted = jitted
        efe_loss.capability_of = efe_launch.capability_of
    return compiled


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a cubin, by the cuobjdump that comes with Triton."""
    text = run_tool("cuobjdump", cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def warps_per_sm(arch: int, registers: int, warps: int) -> int:
    """Warps of a kernel that a multiprocessor holds at once, where nothing but registers is short."""
    most_warps, most_blocks = LIMITS[max(known for known in LIMITS if known <= arch)]
    # given out per warp in units of 256
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256)
    return min(by_registers // warps, most_blocks, most_warps // warps) * warps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100, 120])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--full", action="store_true", help="sets of terms that the trainer does not use, too")
    arguments = parser.parse_args()
    sets = TRAINER | OTHERS if arguments.full else TRAINER
    spilled = 0
    columns = ("regs", "spill B", "shared B", "warps/SM", "loads", "bytes", "trips")
    print(f"{'arch':8}{'dtype':10}{'terms':23}{'kernel':20}" + "".join(f"{name:>10}" for name in columns))
    for arch in arguments.arch:
        triton.runtime.driver.set_active(NoDevice(arch))
        for dtype in arguments.dtype:
            for name, options in sets.items():
                for kernel in compile_all(*options, getattr(torch, dtype)):
                    cubin, made = kernel.asm["cubin"], kernel.metadata
                    use = resources(cubin)
                    spill = use["STACK"] + use["LOCAL"]
                    resident = warps_per_sm(arch, use["REG"], made.num_warps)
                    memory = read_memory(run_tool("nvdisasm", cubin, "-c"))
                    figures = (use["REG"], spill, made.shared, resident, *memory)
                    line = "".join(f"{figure:10}" for figure in figures)
                    print(f"{f'sm_{arch}':8}{dtype:10}{name:23}{made.name:20}{line}")
                    spilled += spill > 0
    if spilled:
        print(f"{spilled} kernels spill registers")
    return int(spilled > 0)


if __name__ == "__main__":
    raise SystemExit(main())
