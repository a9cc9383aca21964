"""The fused EFE loss against eager torch, torch.compile and, on CUDA, Liger's losses put together.

Nothing is timed before a contender gave the loss and the gradients that the specification gives in float64.

    python bench/bench_efe_loss.py                         # contenders in turns, ratios, memory; written to results/
    pytest bench/bench_efe_loss.py --benchmark-only        # each for itself, pytest-benchmark's table
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_fused.ops import COMPILED, EFEWeights, efe_loss

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OURS = "triton" if CUDA else "cpp"
# B, T, C, H, W
SIZES = {"arc": (32, 5, 10, 30, 30), "large": (2800 if CUDA else 256, 5, 10, 30, 30)}
WEIGHTS = EFEWeights()
LEAVES = ("plan_logits", "back_logits", "preference_logits", "prompt_colors")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
Loss = Callable[..., Tensor]


def make_case(size: str, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Tensor]:
    B, T, C, H, W = SIZES[size]
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    case = {
        "plan_logits": normal(B, T, C, H, W),
        "target": torch.randint(0, C, (B, H, W), generator=g, device=device),
        "back_logits": normal(B, T, C, H, W),
        "preference_logits": normal(B, C, H, W),
        "anchor_log_probs": torch.randn(C, H, W, generator=g, device=device).log_softmax(0),
        "prompt_colors": normal(B, C),
    }
    return {name: x.requires_grad_() if name in LEAVES else x for name, x in case.items()}


def eager(**case: Tensor) -> Tensor:
    return efe_loss(**case, weights=WEIGHTS, backend="reference").loss


def ours(**case: Tensor) -> Tensor:
    return efe_loss(**case, weights=WEIGHTS, backend=OURS).loss


def liger(**case: Tensor) -> Tensor:
    """The nearest that Liger's kernels compose to: cross-entropy, KL and JSD on class-last copies of the logits.

    No anchor, no prompt, no hard-cell weight; no gradient to the preference or to the backward plan.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    plan, back = (case[name].movedim(2, -1).flatten(0, 3).contiguous() for name in ("plan_logits", "back_logits"))
    preference = case["preference_logits"][:, None].expand_as(case["plan_logits"]).movedim(2, -1).flatten(0, 3)
    last = case["plan_logits"][:, -1].movedim(1, -1).flatten(0, 2).contiguous()
    ce = liger_cross_entropy(last, case["target"].flatten())
    log_q = plan.log_softmax(-1)
    risk = liger_kl_div(log_q, preference.softmax(-1).detach(), reduction="batchmean")
    return ce + risk + 0.5 * liger_jsd(log_q, back.log_softmax(-1).detach())


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {OURS: ours, "eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
    if CUDA:
        found["torch.compile, graphed"] = torch.compile(eager, fullgraph=True, mode="reduce-overhead")
        try:
            import liger_kernel  # noqa: F401

            found["liger CE + KL + JSD"] = liger
        except ImportError:
            pass
    return found


def both(loss: Loss, case: dict[str, Tensor]) -> Tensor:
    for name in LEAVES:
        case[name].grad = None
    value = loss(**case)
    value.backward()
    return value


def error_of(loss: Loss, case: dict[str, Tensor]) -> float:
    """Largest error of the loss and of each gradient against float64, over the largest value of each.

    The specification runs on a few episodes at a time, as float64 needs many times the memory of the case.
    """
    both(loss, case)
    B, worst, total = case["plan_logits"].shape[0], 0.0, 0.0
    for begin in range(0, B, 32):
        part = {name: x[begin : begin + 32] if x.shape[0] == B else x for name, x in case.items()}
        part = {name: x.detach().double() if x.is_floating_point() else x for name, x in part.items()}
        for name in LEAVES:
            part[name].requires_grad_()
        share = part["target"].shape[0] / B
        value = both(eager, part)
        total += value.item() * share
        for name in LEAVES:
            right = part[name].grad * share
            difference = (case[name].grad[begin : begin + 32].double() - right).abs().max()
            worst = max(worst, (difference / right.abs().max()).item())
    found = both(loss, case).item()
    return max(worst, abs(found - total) / abs(total))


def check(name: str, loss: Loss, case: dict[str, Tensor]) -> float | None:
    """Refuse to time a wrong result; the composition of other losses is no EFE loss, and is not compared."""
    if name.startswith("liger"):
        return None
    error = error_of(loss, case)
    limit = TOLERANCE[case["plan_logits"].dtype]
    if not error <= limit:
        raise AssertionError(f"{name} is wrong: error {error:.1e}, limit {limit:.1e}; no time, no speed-up")
    return error


def directions(loss: Loss, case: dict[str, Tensor]) -> dict[str, tuple[Callable, Callable]]:
    """Forward, backward and both: what comes before the clock starts, and what is timed on its result."""

    def clear() -> None:
        for name in LEAVES:
            case[name].grad = None

    def graph() -> Tensor:
        clear()
        return loss(**case)

    def nothing() -> None:
        return None

    return {
        "forward": (nothing, lambda _: loss(**case)),
        "backward": (graph, lambda value: value.backward()),
        "both": (clear, lambda _: loss(**case).backward()),
    }


def byte_count(size: str, dtype: torch.dtype, direction: str) -> int:
    """What has to move: plan, back, preference are read forward; read again and their gradients written backward."""
    B, T, C, H, W = SIZES[size]
    once = B * C * H * W * (2 * T + 1) * dtype.itemsize
    return once * {"forward": 1, "backward": 2, "both": 3}[direction]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(call: Callable, prepare: Callable = lambda: None) -> float:
    value = prepare()
    wait()
    start = time.perf_counter()
    call(value)
    wait()
    return time.perf_counter() - start


def launches_and_syncs(call: Callable, prepare: Callable) -> tuple[int, int]:
    """Kernels that one call starts, and times it makes the host wait."""
    from torch.profiler import ProfilerActivity, profile

    value = prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call(value)
    events = trace.key_averages()
    count = sum(event.count for event in events if "LaunchKernel" in event.key)
    return count, sum(event.count for event in events if "Synchronize" in event.key)


def copy_rate(size: str, dtype: torch.dtype) -> float:
    """GB/s, read and written, of a copy as large as the logits: the ceiling of everything here."""
    source = torch.empty(byte_count(size, dtype, "forward") // dtype.itemsize, dtype=dtype, device=DEVICE)
    to = torch.empty_like(source)
    best = min(timed(lambda _: to.copy_(source)) for _ in range(10))
    return 2 * source.numel() * dtype.itemsize / best / 1e9


def memory_beyond(backend: str, size: str, dtype: str) -> float:
    """Peak bytes beyond inputs and gradients over the bytes of the logits; in a process of its own on the CPU."""
    loss = eager if backend == "eager" else ours
    case = make_case(size, getattr(torch, dtype))
    needed = sum(case[name].numel() * case[name].element_size() for name in LEAVES)
    logits = 2 * case["plan_logits"].numel() * case["plan_logits"].element_size()
    tiny = {name: x[:1].detach() if x.shape[0] == SIZES[size][0] else x.detach() for name, x in case.items()}
    both(loss, {name: x.clone().requires_grad_() if name in LEAVES else x for name, x in tiny.items()})
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(loss, case)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmHWM")
        both(loss, case)
        peak = resident("VmHWM") - before
    return (peak - needed) / logits


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(size: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    case = make_case(size, dtype)
    losses = contenders()
    errors = {name: check(name, loss, case) for name, loss in losses.items()}
    calls = {name: directions(loss, case) for name, loss in losses.items()}
    shape = " x ".join(map(str, SIZES[size]))
    print(f"\n{size}: B x T x C x H x W = {shape}, {str(dtype)[6:]}, load {os.getloadavg()[0]:.1f}")
    if CUDA:
        print(f"copy of the logits: {copy_rate(size, dtype):.0f} GB/s")
    rows = []
    for direction in ("forward", "backward", "both"):
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(rounds + 2):
            for name, by_direction in calls.items():
                prepare, call = by_direction[direction]
                times[name].append(timed(call, prepare))
        for name, found in times.items():
            low, median, high = (statistics.quantiles(found[2:], n=10)[i] for i in (1, 4, 7))
            # of the same round: what else the machine did then slowed both
            ratio = statistics.median(a / b for a, b in zip(found[2:], times[OURS][2:], strict=True))
            rate = byte_count(size, dtype, direction) / median / 1e9
            row = {"size": size, "shape": SIZES[size], "dtype": str(dtype), "direction": direction, "who": name}
            row |= {"ms": median * 1e3, "p20": low * 1e3, "p80": high * 1e3, "gb_per_s": rate, "times_ours": ratio}
            row |= {"error": errors[name], "rounds": rounds}
            count = ""
            if CUDA:
                row["launches"], row["syncs"] = launches_and_syncs(*reversed(calls[name][direction]))
                count = f"{row['launches']:5d} launches {row['syncs']} syncs"
            rows.append(row)
            spread = f"[{low * 1e3:.2f}, {high * 1e3:.2f}]"
            print(f"  {direction:10}{name:24}{median * 1e3:9.2f} ms {spread:20}{ratio:7.2f}x{rate:8.1f} GB/s{count}")
    return rows


@pytest.mark.skipif(not (CUDA or COMPILED), reason="no fused backend here")
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", [OURS, "eager", "torch.compile"])
def test_efe_loss(benchmark, name: str, direction: str) -> None:
    loss = contenders()[name]
    case = make_case("arc", torch.float32)
    benchmark.extra_info["error"] = check(name, loss, case)
    prepare, call = directions(loss, case)[direction]
    benchmark.group = f"efe_loss arc float32 {direction}"
    benchmark.pedantic(
        lambda value: (call(value), wait()), setup=lambda: ((prepare(),), {}), rounds=10, warmup_rounds=2
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s"] = byte_count("arc", torch.float32, direction) / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["arc"], choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_beyond(arguments.memory_of, arguments.size[0], arguments.dtype[0]))
        return
    rows = [row for s in arguments.size for d in arguments.dtype for row in run(s, getattr(torch, d), arguments.rounds)]
    memory = {}
    for who in (OURS, "eager"):
        line = [sys.executable, __file__, "--memory-of", who, "--size", "large"]
        memory[who] = float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
        print(f"memory beyond inputs and gradients, large, {who}: {100 * memory[who]:.1f} % of the logits")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    machine = {
        "device": torch.cuda.get_device_name() if CUDA else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"efe_loss_{DEVICE}.json"
    path.write_text(json.dumps({"machine": machine, "memory_beyond": memory, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
