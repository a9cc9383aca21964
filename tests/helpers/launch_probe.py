"""Run as a script, in a process where Triton compiles: what a call of the Triton loss launches and allocates, as JSON.

Nothing is launched: bench/no_device.py stands in the driver's place, and CPU tensors in the place of CUDA ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import torch
import triton
from no_device import NoDevice
from torch.profiler import ProfilerActivity, profile

from qwen_fused.kernels import efe_loss, launcher

KERNELS = (efe_loss.FORWARD, efe_loss.FINISH, efe_loss.BACKWARD)
WEIGHTS = (1.0, 1.0, 0.0, 0.5, 0.2, 0.3)
OPTIONS = ([weight != 0 for weight in WEIGHTS], WEIGHTS, 0.5, 0, -100)


def inputs(B: int, T: int, C: int, H: int, W: int) -> tuple:
    """Tensors of the schema for the trainer's terms."""
    plan = torch.empty(B, T, C, H, W)
    target = torch.empty(B, H, W, dtype=torch.long)
    preference, anchor = torch.empty(B, C, H, W), torch.empty(C, H, W)
    return plan, target, torch.empty_like(plan), preference, anchor, None, torch.empty(B, C), torch.empty(T), None, None


def forward_backward(tensors: tuple) -> None:
    out = efe_loss._forward(*tensors, *OPTIONS)
    efe_loss._backward(out[0], *tensors, *out[3:], *OPTIONS, (True,) * 5)


def plain(argument: object) -> object:
    """A tensor as its place among those that live, and constants of Triton by name: what can be compared."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, (tuple, list)):
        return [plain(x) for x in argument]
    return argument if isinstance(argument, (int, float, bool, type(None))) else str(argument)


class Made:
    """Stands for a compiled kernel."""

    run, function, packed_metadata = staticmethod(lambda *arguments: None), 0, ()


class Watch(dict):
    """Stands for a jitted kernel and for what was compiled of it: what Triton would tell apart, by the launcher's key.

    As the latter it never finds anything, so that every launch is one of Triton's own.
    """

    def __init__(self, jitted):
        super().__init__()
        self.bind = jitted.create_binder()[-1]
        self.told: set[str] = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        # of each argument its type, and what is known of its value
        self.last = repr(self.bind(*arguments, **options, debug=False)[1:])
        self.told.add(self.last)
        return Made

    def get(self, key):
        return None

    def __setitem__(self, key, compiled):
        super().setdefault(key, set()).add(self.last)


def views(tensors: tuple) -> list[tuple]:
    """The same sizes in memory of other orders: what a caller may hand over."""
    plan, target, back, preference, *others = tensors
    last = plan.movedim(2, -1).contiguous().movedim(-1, 2)
    wide = torch.empty(*plan.shape[:3], plan.shape[3] + 1, 2 * plan.shape[4])[..., : plan.shape[3], : plan.shape[4]]
    one = plan[:1].expand(plan.shape)
    narrow = torch.empty(plan.shape[0], 3 * plan.shape[2])[:, ::3]
    return [(x, target, y, preference, *others) for x, y in ((last, back), (wide, last), (one, wide))] + [
        (plan, target, back, preference[:1].expand(preference.shape), *others[:2], narrow, *others[3:])
    ]


def variants() -> tuple[int, int]:
    """Kernels that a run on ARC tasks can meet, every canvas, batches of 1 to 64; keys that stand for more than one."""
    watched = []
    for kernel in KERNELS:
        kernel.jitted = kernel.compiled = Watch(kernel.jitted)
        watched.append(kernel.compiled)
    for B in (1, 2, 3, 8, 16, 31, 32, 33, 64):
        for H in range(1, 31):
            for W in range(1, 31):
                forward_backward(inputs(B, 5, 10, H, W))
    met = sum(len(kernel.told) for kernel in watched)
    for H, W in ((1, 1), (1, 7), (4, 4), (16, 16), (30, 30)):
        for tensors in views(inputs(16, 5, 10, H, W)):
            forward_backward(tensors)
    return met, sum(len(told) > 1 for kernel in watched for told in kernel.values())


def main() -> None:
    driver = NoDevice(90)
    triton.runtime.driver.set_active(driver)
    tensors = inputs(4, 5, 10, 30, 30)
    found: dict[str, object] = {"not_direct": launcher.NOT_DIRECT}
    # first Triton's own launch, which compiles, then two past it; one with a stride that int32 does not hold
    driver.launches = []
    for _ in range(3):
        forward_backward(tensors)
    found["launches"] = [(name, plain(arguments)) for name, arguments in driver.launches]
    found["compiled"] = [len(kernel.compiled) for kernel in KERNELS]
    with profile(activities=[ProfilerActivity.CPU]) as events:
        forward_backward(tensors)
    counts = {event.key: event.count for event in events.key_averages()}
    found["allocations"] = counts.get("aten::empty", 0) + counts.get("aten::empty_strided", 0)
    found["ops"] = sorted(counts)
    driver.launches = []
    far = torch.empty(45_000).as_strided((1, 5, 10, 30, 30), (2**31, 9000, 900, 30, 1))
    forward_backward((far, *inputs(1, 5, 10, 30, 30)[1:]))
    found["far"] = [len(kernel.compiled) for kernel in KERNELS], len(driver.launches)
    found["variants"], found["ambiguous"] = variants()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
