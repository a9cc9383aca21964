"""Measure the launches of the Triton loss on the GPU that is here, and print rows for kernels/efe_launch.py.

    python bench/tune_efe_loss.py [--classes 10] [--dtype float32 bfloat16] [--episodes 32 2800] [--seconds 2]

Candidates take turns on the same inputs, after each one's loss and gradients were compared with the present row's. The
row names the best over sizes and dtypes: the least product of times over those of the present row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_efe_loss import LEAVES, TOLERANCE, both, fused, graphed, make_case
from harness import Call, Comparison, first_call, in_turns, refuse

from qwen_fused.kernels import efe_launch, efe_loss
from qwen_fused.kernels.efe_launch import Launch, Row, capability_of, launch_row

CELLS, WARPS = (16, 32, 64, 128, 256, 512), (1, 2, 4, 8)
DIRECTIONS = ("forward", "backward")


def candidates() -> list[Launch]:
    """At least half a cell and at most four a thread; time tells which of them spill."""
    return [Launch(cells, warps) for cells, warps in itertools.product(CELLS, WARPS) if 16 <= cells / warps <= 128]


def use(forward: Launch, backward: Launch) -> None:
    """Launch like this from now on."""
    efe_loss.launch_row = lambda classes, capability: Row(classes, forward, backward, "being measured")


def compile_one(job: tuple[Launch, str, int, torch.dtype, int]) -> None:
    """Put one candidate's kernels into Triton's cache on disk; what does not compile is told when its turn comes."""
    launch, direction, classes, dtype, episodes = job
    device = torch.device("cuda", torch.cuda.current_device())
    present = launch_row(classes, capability_of(device))
    use(*(launch if direction == name else getattr(present, name) for name in DIRECTIONS))
    with contextlib.suppress(Exception):
        both(fused, make_case((episodes, 5, classes, 30, 30), dtype, device))


def compile_all(classes: int, dtypes: list[torch.dtype], episodes: int) -> None:
    """All candidates at once, a process for each core: one after another they would take longer than they run."""
    jobs = [(*job, classes, dtype, episodes) for job in itertools.product(candidates(), DIRECTIONS) for dtype in dtypes]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))


def results(case: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [both(fused, case).detach().float(), *(case[name].grad.float() for name in LEAVES)]


def times(
    case: dict[str, torch.Tensor], direction: str, present: Row, tried: list[Launch], seconds: float
) -> dict[Launch, float]:
    """Median seconds of each candidate of one direction; those that don't compile are left out."""
    device = case["target"].device
    right = results(case)

    def run(launch: Launch) -> None:
        use(*(launch if direction == name else getattr(present, name) for name in DIRECTIONS))
        both(fused, case)

    calls: dict[str, Call] = {}
    for launch in tried:
        try:
            run(launch)
            found = results(case)
        except Exception as error:
            # too many registers, or too much shared memory: Triton's and the driver's errors are many
            print(f"  {launch}: {type(error).__name__}", file=sys.stderr)
            continue
        # sums over tiles of other sizes are added up in another order
        limit = TOLERANCE[case["plan_logits"].dtype]
        for one, two in zip(found, right, strict=True):
            refuse(str(launch), ((one - two).abs().max() / two.abs().max()).item(), limit)
        # small ones would show the host's time, large ones' gradients would fill the device if each had a graph
        graph = graphed(case, device) if case["plan_logits"].numel() < 1e7 else None
        calls[str(launch)] = graph or Call(lambda _, launch=launch: run(launch))
    comparison = Comparison("tune", direction, calls, str(getattr(present, direction)), device, lambda _: None)
    about = {name: first_call(call, device)[0] for name, call in calls.items()}
    measured = in_turns(comparison, seconds, about)
    return {launch: statistics.median(measured[str(launch)]) for launch in tried if str(launch) in measured}


def best(by_case: list[dict[Launch, float]], present: Launch) -> tuple[Launch, float]:
    """The candidate that is fastest over all cases, and its time over the present one's, a geometric mean."""
    common = set.intersection(*(set(found) for found in by_case))
    score = {c: math.exp(statistics.fmean(math.log(found[c] / found[present]) for found in by_case)) for c in common}
    chosen = min(score, key=lambda launch: (score[launch], launch))
    return chosen, score[chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--episodes", type=int, nargs="+", default=[32, 2800])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each direction, dtype and size")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_efe_loss: a CUDA device must be there, got none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    capability, classes = capability_of(device), arguments.classes
    present = launch_row(classes, capability)
    compile_all(classes, [getattr(torch, dtype) for dtype in arguments.dtype], min(arguments.episodes))
    chosen = {}
    for direction in DIRECTIONS:
        by_case = []
        for B, dtype in itertools.product(arguments.episodes, arguments.dtype):
            use(present.forward, present.backward)
            case = make_case((B, 5, classes, 30, 30), getattr(torch, dtype), device)
            found = times(case, direction, present, candidates(), arguments.seconds)
            by_case.append(found)
            print(f"\n{direction}, B={B}, C={classes}, {dtype}: ms")
            for launch, seconds in sorted(found.items(), key=lambda item: item[1])[:8]:
                mark = "  (present)" if launch == getattr(present, direction) else ""
                print(f"  {1e3 * seconds:9.4f}  {launch}{mark}")
        launch, ratio = best(by_case, getattr(present, direction))
        chosen[direction] = launch
        print(f"{direction}: {launch}, {ratio:.3f} of the present one's time")
    where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {', '.join(arguments.dtype)}"
    row = Row(classes, chosen["forward"], chosen["backward"], where)
    print(f"\nfor TABLE in kernels/{Path(efe_launch.__file__).name}, rows of one capability by their classes:")
    print(f"    {capability}: ({row},)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
