"""CPU time of an eager forward and backward of the Triton loss, by how it is launched; no GPU needed.

    python bench/launch_path.py [--rounds 15]

A driver that launches nothing stands in Triton's place and CPU tensors in the place of CUDA ones: all is counted but
what CUDA's own library does (some 3 us a launch), the packing of arguments in Triton's C launcher, and what torch's
CUDA allocator takes more or less than its CPU one. Memory is kept between calls, as CUDA's allocator does. CPU time of
the process, ways taken in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# the kernels are to be compiled, whatever the tests around this do
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from no_device import NoDevice

import qwen_fused as qf
from qwen_fused.kernels import efe_loss as triton_loss
from qwen_fused.kernels import launcher
from qwen_fused.loss import dispatch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SHAPE = (32, 5, 10, 30, 30)


def keep_memory() -> None:
    """No page goes back to the system between calls."""
    libc = ctypes.CDLL(None)
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(option, 1 << 30)


def make_step(shape: tuple[int, ...] = SHAPE) -> Callable[[str], None]:
    """A function of the backend that goes forward and backward through the trainer's terms."""
    B, T, C, H, W = shape
    case = {
        "plan_logits": torch.randn(shape),
        "target": torch.randint(0, C, (B, H, W)),
        "back_logits": torch.randn(shape),
        "preference_logits": torch.randn(B, C, H, W),
        "anchor_log_probs": torch.randn(C, H, W),
        "prompt_colors": torch.randn(B, C),
        "step_weight": torch.ones(T),
    }
    leaves = [
        case[name].requires_grad_() for name in ("plan_logits", "back_logits", "preference_logits", "prompt_colors")
    ]
    weights = qf.EFEWeights()

    def step(backend: str) -> None:
        for x in leaves:
            x.grad = None
        qf.efe_loss(**case, weights=weights, backend=backend).loss.backward()

    return step


def prepare() -> NoDevice:
    """Let CPU tensors through to the Triton kernels, compiled ones, and launch nothing."""
    driver = NoDevice(90)
    triton.runtime.driver.set_active(driver)
    dispatch.triton_loss.INTERPRETED = True
    return driver


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of 100 calls each way")
    rounds = parser.parse_args().rounds
    if launcher.NOT_DIRECT is not None:
        print(f"launch_path: no launch goes past Triton's: {launcher.NOT_DIRECT}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_memory()
    prepare()
    step = make_step()
    warnings.filterwarnings("ignore", "(?s).*[Oo]verrid")
    # the ways: reason not to go past Triton's launcher, and the backend whose op is called
    ways = {"Triton's launcher, node in Python": ("asked for", "triton"), "past it, node in Python": (None, "triton")}
    kept = None
    if dispatch.COMPILED:
        kept = triton_loss.implement("CPU")
        ways["past it, node in C++"] = (None, "cpp")
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (reason, backend) in ways.items():
            launcher.NOT_DIRECT = reason
            for kernel in (triton_loss.FORWARD, triton_loss.FINISH, triton_loss.BACKWARD):
                kernel.compiled.clear()
            step(backend)
            start = time.process_time_ns()
            for _ in range(100):
                step(backend)
            if turn:
                taken[name].append((time.process_time_ns() - start) / 100 / 1e3)
    del kept
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {list(SHAPE)}, CPU us of forward and backward")
    for name, times in taken.items():
        print(f"{name:36}{min(times):8.0f} least{statistics.median(times):8.0f} median")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
