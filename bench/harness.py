"""What the benches have in common: contenders timed in turns, summaries, and a wrong result that gets no figure.

A bench yields `Comparison`s: contenders that do the same work. `measure` checks each one's result, calls each once for
the memory that it takes, then times them in turns, round by round, so that what else the machine does in a round slows
all of them alike: the ratio to ours is the median over rounds of the ratios within a round. Times are medians with the
20th and 80th percentile.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# threads that spin at barriers starve each other on a busy machine; torch reads it when it loads OpenMP
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# nothing here may reach for a model hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from on_device import device_ms, launches_and_syncs, wait

# seconds for one comparison, and the fewest rounds that give a median and its spread
SECONDS = {"quick": 2.0, "full": 10.0}
FEWEST, MOST = 3, 60
# what `timed` reads: on a machine that others work on too, a bench of one thread may take time.process_time
CLOCK = time.perf_counter
# a call shorter than this is repeated within a round, to stand above the clock and a device's wait
SHORTEST = 0.01


class WrongResult(AssertionError):
    """A contender of ours does not compute what it should: no time, no speed-up."""


@dataclass(frozen=True)
class Call:
    """What is timed, given what `prepare` returned before the clock started; `share` of the comparison's work."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """Contenders that do the same work.

    Args:
        bench, case: what is compared.
        calls: name -> call; `ours` is one of them.
        check: error of a contender by its name, None where there is nothing to compare with; raises WrongResult.
        bytes: what has to move through memory, each input read and each output written once.
        operations: arithmetic of the work, exp and log counted as one each.
        episodes: that one call trains on.
    """

    bench: str
    case: str
    calls: dict[str, Call]
    ours: str
    device: torch.device
    check: Callable[[str], float | None]
    bytes: int | None = None
    operations: int | None = None
    episodes: int | None = None


@dataclass(frozen=True)
class Row:
    """One contender's figures in one comparison; None is what was not, or can't be, measured here."""

    bench: str
    case: str
    who: str
    ours: bool
    ms: float
    p20: float
    p80: float
    rounds: int
    times_ours: float
    error: float | None
    bytes: int | None
    operations: int | None
    gb_per_s: float | None
    episodes_per_s: float | None
    device_ms: float | None
    launches: int | None
    syncs: int | None
    peak_mb: float | None


def measure(comparison: Comparison, level: str) -> list[Row]:
    """Check every contender, then time them in turns.

    Raises:
        WrongResult: a contender is wrong; nothing was timed.
    """
    errors = {name: comparison.check(name) for name in comparison.calls}
    first = {name: first_call(call, comparison.device) for name, call in comparison.calls.items()}
    times = in_turns(comparison, SECONDS[level], {name: about for name, (about, _) in first.items()})
    return [row_of(comparison, name, times, errors[name], first[name][1]) for name in comparison.calls]


def first_call(call: Call, device: torch.device) -> tuple[float, float | None]:
    """About how many seconds a call takes, and its memory, see `peak_mb`; the call is warm afterwards."""
    start = time.perf_counter()
    peak = peak_mb(call, device)
    about = (time.perf_counter() - start) / call.share
    # what is slow is warm after one call; the first one of what is fast tells nothing of the next
    return (about if about >= 1 else timed(call, device)), peak


def in_turns(comparison: Comparison, seconds: float, about: dict[str, float]) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry per round.

    Args:
        comparison: whose calls are warm.
        seconds: for all rounds together, more where the fewest rounds take longer.
        about: name -> about how many seconds a call takes.
    """
    calls, device = comparison.calls, comparison.device
    repeats = {
        name: 1 if call.prepare else max(1, round(SHORTEST / max(about[name], 1e-6))) for name, call in calls.items()
    }
    round_trip = sum(about[name] * repeats[name] * calls[name].share for name in calls)
    rounds = max(FEWEST, min(MOST, round(seconds / round_trip)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device, repeats[name]))
    return times


def timed(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds for the comparison's work, the device's own included."""
    value = call.prepare() if call.prepare else None
    wait(device)
    start = CLOCK()
    for _ in range(repeats):
        call.run(value)
    wait(device)
    return (CLOCK() - start) / repeats / call.share


def row_of(
    comparison: Comparison, name: str, times: dict[str, list[float]], error: float | None, peak: float | None
) -> Row:
    """Summary of one contender."""
    found, ours = times[name], times[comparison.ours]
    p20, _, _, p80 = statistics.quantiles(found, n=5, method="inclusive")
    median = statistics.median(found)
    # whole training runs start tens of thousands: their profile would take longer than they do
    profiled = comparison.device.type == "cuda" and comparison.episodes is None
    call, device = comparison.calls[name], comparison.device
    launches, syncs = launches_and_syncs(call, device) if profiled else (None, None)
    alone = device_ms(call, device, median) if profiled else None
    # a rate is that of the kernels, where their own time is known
    seconds = median if alone is None else 1e-3 * alone
    return Row(
        bench=comparison.bench,
        case=comparison.case,
        who=name,
        ours=name == comparison.ours,
        ms=1e3 * median,
        p20=1e3 * p20,
        p80=1e3 * p80,
        rounds=len(found),
        times_ours=statistics.median(a / b for a, b in zip(found, ours, strict=True)),
        error=error,
        bytes=comparison.bytes,
        operations=comparison.operations,
        gb_per_s=comparison.bytes / seconds / 1e9 if comparison.bytes else None,
        episodes_per_s=comparison.episodes / median if comparison.episodes else None,
        device_ms=alone,
        launches=launches,
        syncs=syncs,
        peak_mb=peak,
    )


def peak_mb(call: Call, device: torch.device) -> float | None:
    """Most memory that one call takes beyond what was there before it, as the last call's gradients; None unknown."""
    value = call.prepare() if call.prepare else None
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run(value)
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        # what the allocator keeps for later would hide what a call takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident_mb()
    call.run(value)
    return resident_mb() - before


def resident_mb() -> float:
    """Most memory that this process had since its count was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM"))


def benchmark_one(benchmark, comparison: Comparison, name: str) -> None:
    """One contender under pytest-benchmark: checked, then timed by itself."""
    benchmark.group = f"{comparison.bench}: {comparison.case}"
    benchmark.extra_info["error"] = comparison.check(name)
    call, device = comparison.calls[name], comparison.device

    def run(value: Any) -> None:
        call.run(value)
        wait(device)

    def prepare() -> tuple[tuple, dict]:
        return (call.prepare() if call.prepare else None,), {}

    benchmark.pedantic(run, setup=prepare, rounds=FEWEST, warmup_rounds=1)
    median = benchmark.stats.stats.median / call.share
    if comparison.bytes:
        benchmark.extra_info["gb_per_s"] = comparison.bytes / median / 1e9
    if comparison.episodes:
        benchmark.extra_info["episodes_per_s"] = comparison.episodes / median


def refuse(name: str, error: float, limit: float) -> float:
    """The error, if it is small enough.

    Raises:
        WrongResult: it is not; a NaN is not.
    """
    if not error <= limit:
        raise WrongResult(f"{name} is wrong: error {error:.1e}, limit {limit:.1e}; no time, no speed-up")
    return error


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(rows: list[Row]) -> None:
    """One line per contender, a heading per comparison."""
    heading = None
    for row in rows:
        if (row.bench, row.case) != heading:
            heading = row.bench, row.case
            print(f"\n{row.bench}: {row.case}")
        print("  " + line_of(asdict(row)))
    sys.stdout.flush()


def line_of(row: dict) -> str:
    """A row as one line of the table."""
    cells = [f"{'* ' if row['ours'] else '  '}{row['who']:26}{row['ms']:10.3f} ms [{row['p20']:.3f}, {row['p80']:.3f}]"]
    cells.append(f"{row['times_ours']:7.2f}x")
    if row["gb_per_s"] is not None and row["bytes"] >= 1e6:
        cells.append(f"{row['gb_per_s']:8.1f} GB/s")
    if row["episodes_per_s"] is not None:
        cells.append(f"{row['episodes_per_s']:8.2f} episodes/s")
    if row["peak_mb"] is not None:
        cells.append(f"{row['peak_mb']:.0f} MB more")
    if row.get("device_ms") is not None:
        cells.append(f"device {row['device_ms']:.3f} ms")
    if row["launches"] is not None:
        cells.append(f"{row['launches']} launches, {row['syncs']} syncs")
    if row["error"] is not None:
        cells.append(f"error {row['error']:.0e}")
    return "  ".join(cells)
