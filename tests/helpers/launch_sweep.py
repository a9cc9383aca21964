"""Run as a script: whether every launch past Triton's launcher is the one that Triton's own would have made.

    python tests/helpers/launch_sweep.py [--sets 60] [--calls 40] [--seed 0] [--compile]

Random calls of the Triton loss, each kernel launched by Triton and past it with the same tensors, through Triton's own
C launchers, to a libcuda that keeps what it is asked for. The same must be asked for: the kernel that was loaded for
this specialisation on this device, grid, stream, and each byte of the parameters.

Sets of terms, types and options are random, and so are canvases from 1 to 30, batches from 1 to 64, memory orders with
gaps, overlaps and odd beginnings, strides about what 32 bits hold, and two devices. Kernels are not compiled, as what
Triton would compile is told from its signature; with --compile they are. Prints JSON; exit code 1 where a launch
differs.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import mmap
import os
import random
import tempfile
from collections.abc import Callable, Sequence

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.compiler
from recording_driver import Driver, Recording, compiled_by, pretend
from torch import Tensor

from qwen_fused.kernels import efe_loss, launcher

KERNELS = (efe_loss.FORWARD, efe_loss.FINISH, efe_loss.BACKWARD)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# about where 4 s + 2 leaves 32 bits, and where s does
FAR = [base + more for base in (2**29, 2**30, 2**31, 2**32) for more in (-1, 0, 1)]
# address space alone: no page of it is written
SPACE = mmap.mmap(-1, 2**42, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))


class Counted:
    """A jitted kernel that counts its launches."""

    def __init__(self, jitted) -> None:
        self.jitted, self.launches = jitted, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.jitted[grid]


class BothWays:
    """Stands for `Kernel.__call__`: launches by Triton, then past it, and keeps what differs."""

    def __init__(self, past: Callable, recording: Recording, driver: Driver) -> None:
        self.past, self.recording, self.driver = past, recording, driver
        self.faults: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.direct: set[int] = set()
        self.alone = False  # whether Triton launches nothing besides

    def launch(
        self,
        kernel: launcher.Kernel,
        blocks: int,
        pointers: Sequence[Tensor | None],
        strides: Sequence[Sequence[int] | None],
        numbers: Sequence[int | float],
        constants: tuple,
        warps: int,
    ) -> None:
        if self.alone:
            self.past(kernel, blocks, pointers, strides, numbers, constants, warps)
            self.counts["alone"] += self.recording.take() is not None
            return
        packed = [None if own is None else tuple(4 * s + 2 for s in own) for own in strides]
        kernel.jitted[(blocks,)](*pointers, *packed, *numbers, *constants, num_warps=warps, enable_fp_fusion=True)
        own = self.recording.take()
        found = []
        # the first may be Triton's as well
        for _ in range(2):
            before = kernel.jitted.launches
            self.past(kernel, blocks, pointers, strides, numbers, constants, warps)
            found.append(self.recording.take())
        direct = kernel.jitted.launches == before
        wide = any(x >= 2**31 for own in packed if own is not None for x in own)
        asked = own is not None and (own.grid, own.block, own.stream) == (
            (blocks, 1, 1), (32 * warps, 1, 1), self.driver.stream_of(self.driver.device)
        )  # fmt: skip
        if not asked or found != [own, own] or direct == wide:
            self.faults.append(f"{kernel.jitted.jitted.__name__}: {own}, then {found}; direct: {direct}, wide: {wide}")
        self.counts["direct" if direct else "by Triton"] += 1
        if direct:
            self.direct.add(own.function)


def view(draw: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of a random memory order, with gaps, dimensions that do not move, and an odd beginning."""
    order = draw.sample(range(len(shape)), len(shape)) if draw.random() < 0.5 else [*reversed(range(len(shape)))]
    strides, stride = [0] * len(shape), draw.choice([1, 1, 1, 1, 2, 4, 7, 16])
    for dim in order:
        strides[dim] = stride
        stride *= shape[dim] * draw.choice([1, 1, 1, 1, 2, 3])
    kind = draw.random()
    if kind < 0.2:
        strides[draw.randrange(len(shape))] = 0
    elif kind < 0.23:
        # never more than SPACE: of a dimension with few
        dim = draw.choice([0, draw.randrange(len(shape))])
        strides[dim] = draw.choice(FAR) if shape[dim] <= 64 else strides[dim]
    return torch.frombuffer(SPACE, dtype=dtype).as_strided(shape, strides, draw.choice([0, 0, 0, 1, 2, 3, 5, 8]))


def random_set(draw: random.Random) -> dict:
    """Types, terms and options: what kernels are compiled for."""
    # two mixtures a set, which share every constant; most tensors of one have one type, as in training
    mains = draw.sample(FLOATS, 2)
    return {
        "C": draw.choice([1, 2, 3, 10, 10, 10, 16]),
        "on": [draw.random() < 0.7 for _ in range(6)],
        "types": [[main if draw.random() < 0.7 else draw.choice(FLOATS) for _ in range(9)] for main in mains],
        "targets": [torch.long, draw.choice([torch.long, torch.int32, torch.uint8])],
        "steps": draw.random() < 0.5,
        "classes": draw.random() < 0.5,
        "annealed": draw.random() < 0.5,
        "hard_mode": draw.randrange(3),
        "needs": [draw.random() < 0.8 for _ in range(5)],
    }


def random_size(draw: random.Random) -> tuple[int, int, int, int]:
    """Episodes, steps and canvas; those more often where something begins to be otherwise."""
    B = draw.choice([1, 31, 32, 33, draw.randint(1, 64)])
    H, W = (draw.choice([1, 16, draw.randint(1, 30)]) for _ in range(2))
    return B, draw.randint(1, 6), H, W


def call(draw: random.Random, one: dict, B: int, T: int, H: int, W: int) -> None:
    """Forward and backward of one set in random memory."""
    C = one["C"]
    _, risk, ambiguity, agreement, anchor, prompt = one["on"]
    plan, back, preference, fixed, entropy, colors, steps, classes, annealed = draw.choice(one["types"])
    tensors = (
        view(draw, plan, B, T, C, H, W),
        view(draw, draw.choice(one["targets"]), B, H, W),
        view(draw, back, B, T, C, H, W) if agreement else None,
        view(draw, preference, B, C, H, W) if risk or anchor else None,
        view(draw, fixed, C, H, W) if anchor else None,
        view(draw, entropy, C) if ambiguity else None,
        view(draw, colors, B, C) if prompt else None,
        view(draw, steps, T) if one["steps"] else None,
        view(draw, classes, C) if one["classes"] else None,
        torch.empty(7, dtype=annealed) if one["annealed"] else None,
    )
    weights = [draw.choice([0, 1, draw.random()]) for _ in range(6)]
    options = (one["on"], weights, draw.choice([0, 1, 0.25]), one["hard_mode"], draw.choice([-100, 0, -(2**62), 255]))
    out = efe_loss._forward(*tensors, *options)
    efe_loss._backward(out[0], *tensors, *out[3:], *options, one["needs"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=60, help="of terms, types and options")
    parser.add_argument("--calls", type=int, default=40, help="of each set, forward and backward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the kernels, some seconds each")
    arguments = parser.parse_args()
    assert launcher.NOT_DIRECT is None, launcher.NOT_DIRECT
    folder = tempfile.TemporaryDirectory()
    recording, driver = Recording(folder.name), Driver()
    triton.runtime.driver.set_active(driver)
    triton.compiler.compile = compiled_by(triton.compiler.compile) if arguments.compile else pretend
    both = BothWays(launcher.Kernel.__call__, recording, driver)
    launcher.Kernel.__call__ = lambda kernel, *arguments: both.launch(kernel, *arguments)
    # the tensors are the host's, on whichever device is the current one
    Tensor.get_device = lambda tensor: driver.device
    for kernel in KERNELS:
        kernel.jitted = Counted(kernel.jitted)

    def sweep(seed: int, sets: int, calls: int) -> None:
        draw = random.Random(seed)
        for _ in range(sets):
            one = random_set(draw)
            for _ in range(calls):
                driver.device = draw.choice([0, 0, 1])
                call(draw, one, *random_size(draw))

    sweep(arguments.seed, arguments.sets, arguments.calls)
    # half a billion elements, and three billion
    for B in (12_000, 65_536):
        draw = random.Random(B)
        call(draw, {**random_set(draw), "C": 10}, B, 5, 30, 30)
    # what Triton lets go of it unloads, and to launch that is an error
    for kernel in KERNELS:
        kernel.jitted.jitted.device_caches.clear()
    gc.collect()
    both.alone = True
    sweep(arguments.seed, 1, arguments.calls)
    found = {"triton": triton.__version__, **both.counts, "kernels": len(both.direct)}
    found |= {"keys": sum(len(kernel.compiled) for kernel in KERNELS), "faults": len(both.faults)}
    print(json.dumps(found | {"first": both.faults[:2]}))
    return int(bool(both.faults))


if __name__ == "__main__":
    raise SystemExit(main())
