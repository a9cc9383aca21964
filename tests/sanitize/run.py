"""Run the CPU loss's tiles under ASan, UBSan and TSan, and show that they catch a planted race and overrun."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# sanitizers, macro, what the program must say
RUNS = (
    *(("address,undefined", f"-DQF_BEST_LEVEL={level}", "clean") for level in (1, 3, 4)),
    *(("thread", f"-DQF_BEST_LEVEL={level}", "clean") for level in (1, 3, 4)),
    ("thread", "-DPLANT_RACE", "ThreadSanitizer: data race"),
    ("address,undefined", "-DPLANT_OVERRUN", "AddressSanitizer: heap-buffer-overflow"),
)


def main() -> int:
    include = Path(torch.__file__).parent / "include"
    failed = 0
    for sanitizers, macro, expected in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "tiles"
            sources = [ROOT / "tests" / "sanitize" / "tiles.cpp", ROOT / "csrc" / "efe_tiles.cpp"]
            options = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", macro, "-O1", "-g1"]
            options += ["-std=c++20", "-fno-math-errno", "-Wno-psabi", f"-I{include}", f"-I{ROOT / 'csrc'}", "-pthread"]
            subprocess.run(["g++", *options, *sources, "-o", program], check=True)
            done = subprocess.run([program], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        right = expected in said and (expected != "clean" or done.returncode == 0)
        failed += not right
        print(f"{sanitizers:20}{macro:22}{'as expected' if right else 'NOT ' + expected}: {expected}", flush=True)
        if not right:
            print(said[-3000:], file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
