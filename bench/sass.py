"""What a kernel's machine code says of its memory: global loads on their way at once, and waits one after another.

The code is walked as it lies, a loop's body once. A load is on its way from where it is issued to the first instruction
that reads or overwrites a register of its result. Latency is long against everything between, so a wait for a load
that was issued after the wait before is a trip to memory of its own, and any other comes for nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

TOOLS = "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
REGISTER = re.compile(r"(?<![A-Z0-9_])R(\d+)((?:\.64)?)")
WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
WARP = 32


class Memory(NamedTuple):
    """Of one warp, by its machine code."""

    loads: int  # most global loads on their way at once
    bytes: int  # what the lanes of a full warp have asked for then
    trips: int  # waits for memory, one after another; a loop's counted once


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / TOOLS / name


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """What it prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout


def read_memory(text: str) -> Memory:
    """From the disassembly of one kernel by `nvdisasm -c`."""
    flying: dict[int, int] = {}  # first register of a load's result -> its number
    widths: dict[int, int] = {}  # number -> bytes a lane
    registers: dict[int, set[int]] = {}
    waited = issued = trips = 0
    most = (0, 0)
    for name, operands in INSTRUCTION.findall(text):
        touched: set[int] = set()
        for number, wide in REGISTER.findall(operands):
            touched.update(range(int(number), int(number) + (2 if wide else 1)))
        for first, load in list(flying.items()):
            if not touched.isdisjoint(registers[load]):
                del flying[first]
                if load >= waited:
                    trips += 1
                    waited = issued
        parts = name.split(".")
        if parts[0] not in ("LDG", "LD"):
            continue
        width = next((WIDTH[part] for part in parts if part in WIDTH), 4)
        first = int(REGISTER.search(operands)[1])
        flying[first] = issued
        widths[issued] = width
        registers[issued] = set(range(first, first + max(1, width // 4)))
        issued += 1
        now = (len(flying), WARP * sum(widths[load] for load in flying.values()))
        most = (max(most[0], now[0]), max(most[1], now[1]))
    return Memory(*most, trips)
