"""Per-group gradient norms and clipping against what a user would otherwise call, taken in turns in one process.

Nothing is timed before ours gave the norms and the clipped gradients that float64 gives; the others' errors are told.
`read` is a plain sum over the same gradients: what reading them once costs, and so the ceiling of `measure`.

    python bench/bench_grad_norm.py                             # 2000 small tensors; the shapes of Qwen2.5-0.5B
    python bench/bench_grad_norm.py --case qwen2.5-1.5b --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, Qwen2Config

from qwen_fused import backends
from qwen_fused.gradients import GroupGradNorm

RESULTS = Path(__file__).parent / "results"
QWEN = {
    "qwen2.5-0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864),
    "qwen2.5-1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960),
}
LOOSE = 1e9


def shapes_of(case: str) -> dict[str, list[torch.Size]]:
    """Group -> shapes; of a Qwen's config alone, no weights."""
    if case == "2000 small":
        return {f"group{i}": [torch.Size([16, 16])] * 500 for i in range(4)}
    config = Qwen2Config(**QWEN[case], vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    groups: dict[str, list[torch.Size]] = {"embeddings": [], "lower": [], "upper": []}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        half = config.num_hidden_layers // 2
        group = "embeddings" if name.startswith("embed") else "lower" if layer is not None and layer < half else "upper"
        groups[group].append(parameter.shape)
    return groups


def make(case: str, dtype: torch.dtype, device: torch.device) -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator(device).manual_seed(0)
    groups = {}
    for group, shapes in shapes_of(case).items():
        groups[group] = []
        for shape in shapes:
            # the parameter itself is never touched: one element stands for it
            p = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape))
            p.grad = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(1e-2)
            groups[group].append(p)
    return groups


def contenders(groups: dict[str, list[nn.Parameter]], bound: float) -> dict[str, dict[str, Callable]]:
    """What to compare: title -> name -> a call; each call of a title does the same work, the first one is ours."""
    norms = GroupGradNorm(groups)
    grads = {name: [p.grad for p in group] for name, group in groups.items()}

    def ours_clip(limit: float) -> torch.Tensor:
        stats = norms.measure()
        norms.clip_(stats, limit)
        return stats.norm

    def torch_clip(limit: float) -> torch.Tensor:
        return torch.stack([torch.nn.utils.clip_grad_norm_(group, limit, foreach=True) for group in groups.values()])

    def foreach() -> torch.Tensor:
        return torch.stack([torch.nn.utils.get_total_norm(group, foreach=True) for group in grads.values()])

    def naive() -> torch.Tensor:
        return torch.tensor([sum(g.norm().item() ** 2 for g in group) ** 0.5 for group in grads.values()])

    def read() -> torch.Tensor:
        return torch.stack([torch.stack([g.sum() for g in group]).sum() for group in grads.values()])

    return {
        "measure": {
            "qwen-fused": lambda: norms.measure().norm,
            "torch foreach": foreach,
            ".item() loop": naive,
            "read": read,
        },
        "measure + clip": {"qwen-fused": lambda: ours_clip(bound), "clip_grad_norm_": lambda: torch_clip(bound)},
        "measure + clip, within bounds": {
            "qwen-fused": lambda: ours_clip(LOOSE),
            "clip_grad_norm_": lambda: torch_clip(LOOSE),
        },
    }


def exact(groups: dict[str, list[nn.Parameter]]) -> torch.Tensor:
    """float64 norms, tensor by tensor so that nothing large is copied at once."""
    squares = [[p.grad.double().square().sum() for p in group] for group in groups.values()]
    return torch.stack([torch.stack(group).sum().sqrt() for group in squares]).cpu()


def check(groups: dict, calls: dict[str, dict[str, Callable]], bound: float, dtype: torch.dtype) -> dict:
    """Each contender's largest relative error; refuses to go on where ours is wrong, in the norms or the clip.

    Leaves the gradients clipped, so that later clips find the same work.
    """
    errors = {}
    unit = torch.finfo(dtype).eps
    for title, by_name in calls.items():
        for name, call in by_name.items():
            before = exact(groups)
            errors[title, name] = ((call().double().cpu() - before).abs() / before).max().item()
            after = exact(groups)
            if name == "qwen-fused":
                assert errors[title, name] < 1e-5, f"{title}: the norms are off by {errors[title, name]:.1e}"
                limit = torch.full_like(before, bound if title == "measure + clip" else LOOSE)
                torch.testing.assert_close(after, before.minimum(limit), rtol=max(1e-5, unit), atol=0)
            for group in groups.values():
                for p in group:
                    p.grad.mul_(2.0)
    return errors


def timed(call: Callable, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def launches(call: Callable) -> int:
    """Kernels that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if "LaunchKernel" in event.key)


def run(case: str, dtype: torch.dtype, device: torch.device, seconds: float) -> list[dict]:
    groups = make(case, dtype, device)
    gradients = [p.grad for group in groups.values() for p in group]
    size = sum(g.numel() * g.element_size() for g in gradients)
    bound = 0.5 * exact(groups).min().item()
    calls = contenders(groups, bound)
    errors = check(groups, calls, bound, dtype)
    print(f"\n{case}, {len(gradients)} tensors in {len(groups)} groups, {size / 1e6:.0f} MB of {str(dtype)[6:]}")
    rows = []
    for title, by_name in calls.items():
        first = max(timed(call, device, 1) for call in by_name.values())
        repeats = max(1, int(0.02 / first))
        rounds = max(7, min(60, int(seconds / (first * repeats * len(by_name)))))
        times: dict[str, list[float]] = {name: [] for name in by_name}
        for _ in range(rounds):
            for name, call in by_name.items():
                times[name].append(timed(call, device, repeats))
        for name, found in times.items():
            low, median, high = (statistics.quantiles(found, n=10)[i] for i in (1, 4, 7))
            # of the same round: what else the machine did then slowed both
            ratio = statistics.median(a / b for a, b in zip(found, times["qwen-fused"], strict=True))
            row = {"case": case, "dtype": str(dtype), "what": title, "who": name, "ms": median * 1e3, "p20": low * 1e3}
            row |= {"p80": high * 1e3, "times_ours": ratio, "rounds": rounds}
            # a sum of elements has nothing to be compared with
            error = "" if name == "read" else f"error {errors[title, name]:.0e}"
            row["error"] = None if name == "read" else errors[title, name]
            if title == "measure":
                row["gb_per_s"] = size / median / 1e9
            if device.type == "cuda":
                row["launches"] = launches(by_name[name])
            rows.append(row)
            rate = f"{row['gb_per_s']:7.1f} GB/s" if title == "measure" and size > 1e8 else ""
            count = f"{row['launches']:6d} launches" if "launches" in row else ""
            spread = f"[{row['p20']:.3f}, {row['p80']:.3f}]"
            print(f"  {title:30}{name:17}{row['ms']:9.3f} ms  {spread:22}{ratio:7.2f}x  {error:14}{rate}{count}")
    return rows


def machine(device: torch.device) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=["2000 small", "qwen2.5-0.5b"], choices=["2000 small", *QWEN])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each comparison")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if not backends.has_kernel("group_grad_norm", device.type):
        raise SystemExit(f"the extension is not built for {device.type}: {backends.build_command()}")
    rows = [row for case in arguments.case for row in run(case, dtype, device, arguments.seconds)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"grad_norm_{device.type}_{arguments.dtype}.json"
    path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
