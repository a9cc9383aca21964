"""The training step launched operation by operation against the step as CUDA graphs: ms, episodes/s, device busy.

    python bench/graph_step.py [--precision bf16] [--side 30] [--out FOLDER] [--cpu]

Both are the trainer's own loop, with the tiny Qwen, over windows of ten batches of sixteen episodes from the twenty
tasks of tasks20.json, Qwen's pass and step at each window's end included. They take turns, window by window, so that
the machine's moods fall on both. There is no figure unless their losses agree. --side puts every batch on a canvas of
that side; without it the eager step has canvases cut to their batches, as with --cuda-graphs off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent / "tests" / "helpers")]

from harness import refuse  # noqa: E402
from machine import device_name  # noqa: E402
from material import TWENTY  # noqa: E402

from qwen_fused.arc.episodes import Episode, collate  # noqa: E402
from qwen_fused.config import TrainConfig  # noqa: E402
from qwen_fused.train import trainer as trainer_module  # noqa: E402
from qwen_fused.train.graphed_step import GraphedStep  # noqa: E402
from qwen_fused.train.trainer import Trainer  # noqa: E402

WINDOW = 10
# after ten to twenty steps of AdamW, whose first ones go by signs, from gradients that differ in their last bits
LIMIT = 0.02


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Loop:
    """A trainer and the batches of its windows."""

    def __init__(self, graphs: str, arguments: argparse.Namespace, folder: Path):
        small = dict(batch_size=4, agent_channels=16, plan_steps=2) if arguments.cpu else {}
        device = torch.device("cpu" if arguments.cpu else "cuda")
        config = TrainConfig(
            dataset=str(TWENTY), device=device.type, prompt_window=WINDOW, prove=False, precision=arguments.precision,
            cuda_graphs=graphs, out=folder, **small,
        )  # fmt: skip
        self.device, self.trainer = device, Trainer(config, folder)
        if arguments.cpu and graphs == "auto":
            from op_recorder import OpGraphs

            self.trainer.graphs = GraphedStep(self.trainer, OpGraphs(device, refuse=False).record)
        sampler = self.trainer.sampler
        every = [sampler.batch(0, k) for k in range(sampler.batches_per_epoch())]
        whole = [batch for batch in every if len(batch) == config.batch_size]
        self.batches: list[list[Episode]] = [whole[k % len(whole)] for k in range(WINDOW)]

    def window(self) -> list[float]:
        """A window's losses, each read when the next batch is under way, as in training."""
        losses, pending = [], None
        for number, episodes in enumerate(self.batches):
            running = self.trainer.train_step(episodes, 1, flush=number == WINDOW - 1)
            if pending is not None:
                losses.append(self.trainer.read(pending)["loss"])
            pending = running
        return [*losses, self.trainer.read(pending)["loss"]]

    def timed(self) -> tuple[float, float]:
        """Milliseconds of a step, and those that the host is at it."""
        synchronize(self.device)
        start = time.perf_counter()
        for number, episodes in enumerate(self.batches):
            self.trainer.train_step(episodes, 1, flush=number == WINDOW - 1)
        launched = time.perf_counter()
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start) / WINDOW, 1e3 * (launched - start) / WINDOW

    def profiled(self) -> dict[str, float | None]:
        """How long the device works at a step, and how much is launched, by the host, in one."""
        if self.device.type != "cuda":
            return dict(device_ms=None, launches=None)
        synchronize(self.device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            self.window()
            synchronize(self.device)
        events = trace.key_averages()
        print(events.table(sort_by="self_device_time_total", row_limit=12, max_name_column_width=60))
        # operators carry the time of their kernels a second time
        device = sum(e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA"))
        launches = sum(e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")))
        return dict(device_ms=device / 1e3 / WINDOW, launches=launches / WINDOW)


def memory(device: torch.device) -> float | None:
    """MiB that torch holds on the device."""
    return torch.cuda.memory_reserved(device) / 2**20 if device.type == "cuda" else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--side", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.side:
        side = (arguments.side, arguments.side)
        trainer_module.bucket_canvas = lambda sides: side
        trainer_module.collate = lambda episodes, canvas=None: collate(episodes, canvas=side)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loops, losses, held = {}, {}, {}
        for name, graphs in (("eager", "off"), ("graphs", "auto")):
            loops[name] = Loop(graphs, arguments, Path(folder))
            before = memory(loops[name].device)
            torch.manual_seed(1)
            losses[name] = loops[name].window() + loops[name].window()
            held[name] = None if before is None else memory(loops[name].device) - before
            print(f"{name}: two windows after {time.perf_counter() - began:.1f} s", flush=True)
        recorded = loops["graphs"].trainer.graphs
        assert recorded is not None and recorded.failure is None, recorded and recorded.failure
        assert recorded.steps and recorded.update is not None, "nothing was recorded"
        eager, replayed = (torch.tensor(found, dtype=torch.float64) for found in losses.values())
        # a NaN stays one
        apart = ((eager - replayed).abs() / eager.abs()).max().item()
        refuse("the replayed step's loss", apart, LIMIT)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for _ in range(arguments.rounds):
            for name, loop in loops.items():
                rounds[name].append(loop.timed())
        rows = {}
        for name, loop in loops.items():
            step, host = (statistics.median(column) for column in zip(*rounds[name], strict=True))
            seen = loop.profiled()
            # tracing slows the host down, not the device: its work against the untraced step
            seen["busy"] = None if seen["device_ms"] is None else 100 * seen["device_ms"] / step
            episodes = 1e3 * len(loop.batches[0]) / step
            rows[name] = dict(step_ms=step, host_ms=host, episodes_per_s=episodes, mib=held[name], **seen)
    shapes = sorted(f"{shape[1]}x{shape[2]}" for shape in recorded.steps)
    where = device_name(loops["eager"].device)
    print(f"{where}, torch {torch.__version__}, {arguments.precision}, canvases {', '.join(shapes)}")
    table(rows)
    speed = rows["eager"]["step_ms"] / rows["graphs"]["step_ms"]
    print(f"losses of 20 steps at most {apart:.1e} apart; {time.perf_counter() - began:.0f} s in all")
    print(f"figure: {speed:.2f} times as fast with graphs, {rows['graphs']['episodes_per_s']:.0f} episodes/s")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"graph_step-{arguments.precision}-{arguments.side or 'own'}.json"
        (arguments.out / name).write_text(json.dumps(dict(rows=rows, apart=apart, shapes=shapes), indent=1) + "\n")
    return 0


def table(rows: dict[str, dict]) -> None:
    """A line for each way to run the step; busy is of the untraced step."""
    columns: dict[str, Callable[[float], str]] = {
        "step_ms": "{:.2f}".format, "host_ms": "{:.2f}".format, "device_ms": "{:.2f}".format, "busy": "{:.0f} %".format,
        "launches": "{:.0f}".format, "episodes_per_s": "{:.0f}".format, "mib": "{:.0f}".format,
    }  # fmt: skip
    print(f"{'':8}" + "".join(f"{name:>16}" for name in columns))
    for who, row in rows.items():
        cells = ["-" if row[name] is None else text(row[name]) for name, text in columns.items()]
        print(f"{who:8}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
