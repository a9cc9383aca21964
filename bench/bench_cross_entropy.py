"""`hard_cell_cross_entropy` against F.cross_entropy, forward and backward, from ten cells to millions.

    python bench/bench_cross_entropy.py [--cpu-time] [--level full]

One process, one thread unless told otherwise, in turns, no network. The second contender adds what ours reports with
the loss: predictions and accuracy. A wrong result prints no figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Call, Comparison, benchmark_one, default_device, measure, refuse, show
from torch import Tensor

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = ((1, 10), (16, 10), (64, 10), (1, 10, 3, 3), (1, 10, 30, 30))
LARGE = ((4096, 10), (4096, 32), (4096, 64), (32, 10, 30, 30))
ONCE = ((4096, 2), (65536, 64), (8, 64, 30, 30))
# of the gradient's largest value
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def made(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, last: bool) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).to(device, dtype)
    if last:
        logits = logits.to(memory_format=torch.channels_last)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g).to(device)
    return logits.requires_grad_(), target


def ours(logits: Tensor, target: Tensor) -> Tensor:
    return hard_cell_cross_entropy(logits, target, hard_mode="none").loss


def theirs(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def theirs_with_reports(logits: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, target)
    predicted, valid = logits.detach().argmax(1), target != -100
    _ = ((predicted == target) & valid).sum() / valid.sum()
    return loss


CONTENDERS = {"ours": ours, "F.cross_entropy": theirs, "the same, with accuracy": theirs_with_reports}


def both(name: str, logits: Tensor, target: Tensor) -> Tensor:
    logits.grad = None
    loss = CONTENDERS[name](logits, target)
    loss.backward()
    return loss.detach()


def comparison_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, last: bool = False
) -> Comparison:
    logits, target = made(shape, dtype, device, last=last)
    wide = logits.detach().double().requires_grad_()
    theirs(wide, target).backward()
    right = wide.grad
    assert right is not None

    def check(name: str) -> float:
        both(name, logits, target)
        assert logits.grad is not None
        error = ((logits.grad.double() - right).abs().max() / right.abs().max()).item()
        # torch rounds more often on the way in half precision
        return refuse(name, error, TOLERANCE[dtype] * (1 if name == "ours" else 4))

    return Comparison(
        bench="cross_entropy",
        case=f"{list(shape)} {str(dtype)[6:]}{', class last' if last else ''}, forward and backward",
        calls={name: Call(lambda _, name=name: both(name, logits, target)) for name in CONTENDERS},
        ours="ours",
        device=device,
        check=check,
        bytes=4 * logits.numel() * dtype.itemsize,
    )


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    for dtype in FLOATS:
        shapes = [*(SMALL if dtype == torch.float32 else ()), *LARGE]
        for shape in shapes + (list(ONCE) if level == "full" and dtype == torch.float32 else []):
            yield comparison_of(shape, dtype, device)
        yield comparison_of((32, 10, 30, 30), dtype, device, last=True)


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("shape", [(16, 10), (4096, 64), (32, 10, 30, 30)], ids=str)
def test_cross_entropy(benchmark, shape: tuple[int, ...], who: str) -> None:
    benchmark_one(benchmark, comparison_of(shape, torch.float32, default_device()), who)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--level", choices=("quick", "full"), default="quick")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time: what others do on the machine hardly counts")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        harness.CLOCK = time.process_time
    torch.set_num_threads(arguments.threads)
    for comparison in comparisons("full", default_device()):
        show(measure(comparison, arguments.level))


if __name__ == "__main__":
    main()
