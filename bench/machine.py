"""What a figure belongs to: device, clocks as read, versions, commit; and the device's measured ceilings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from harness import Call, timed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy")
CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}


def output_of(*line: str) -> str | None:
    """What a command prints, None where it can't be run."""
    try:
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def slug(name: str) -> str:
    """The device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clocks(device: torch.device) -> dict[str, float | None]:
    """Clock rates as they are at this moment; nothing is set."""
    if device.type == "cuda":
        fields = ",".join(CLOCKS.values())
        index = str(torch.cuda.current_device() if device.index is None else device.index)
        text = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", index)
        values = text.split(", ") if text else []
        numbers = [float(v) if re.fullmatch(r"[\d.]+", v) else None for v in values] or [None] * len(CLOCKS)
        return dict(zip(CLOCKS, numbers, strict=True))
    try:
        rates = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        rates = []
    return {"cpu_mhz": max(map(float, rates)) if rates else None}


def load() -> float:
    """Processes that want a core, over the last minute."""
    return round(os.getloadavg()[0], 2)


def version_of(package: str) -> str | None:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict:
    """Everything that a figure's reader would ask for."""
    dirty = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "kind": device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": load(),
        "clocks": clocks(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **{package: version_of(package) for package in PACKAGES},
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "dirty": None if dirty is None else bool(dirty),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured: GB/s of a copy (read plus written) and of a sum (read alone), and fp32 GFLOP/s of a matrix product.

    The best of several, as a ceiling is what the device can do. The product is without tensor cores.
    """
    cuda = device.type == "cuda"
    count = (1 << 28) if cuda else (1 << 26)
    source = torch.ones(count, device=device)
    to = torch.empty_like(source)
    side = 8192 if cuda else 1024
    matrix = torch.randn(side, side, device=device)

    def best(run) -> float:
        return min(timed(Call(lambda _: run()), device) for _ in range(8))

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        product = best(lambda: matrix @ matrix)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return {
        "copy_gb_per_s": 2 * 4 * count / best(lambda: to.copy_(source)) / 1e9,
        "read_gb_per_s": 4 * count / best(source.sum) / 1e9,
        "fp32_gflop_per_s": 2 * side**3 / product / 1e9,
    }
