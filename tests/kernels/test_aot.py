"""The Triton loss compiled for a GPU that need not be there: it must fit in registers, with enough warps at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_fused import backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not backends.HAS_TRITON, reason=f"no Triton: {backends.TRITON_ERROR}")
def test_no_spills_and_enough_warps(tmp_path):
    # a process of its own: here the kernels are interpreted
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / "bench" / "aot_efe_loss.py"), "--arch", "90", "--dtype", "float32"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row.rsplit(maxsplit=8) for row in done.stdout.splitlines() if "_kernel" in row]
    assert len(rows) == 6
    for where, kernel, registers, spilled, _, warps, loads, _, trips in rows:
        assert int(spilled) == 0 and 0 < int(registers) < 255, kernel
        # a quarter of the 64 that a processor holds hides the latency of 20 loads a warp has on the way
        if kernel == "efe_forward_kernel":
            assert int(warps) >= 16
        if kernel == "efe_backward_kernel":
            assert int(warps) >= 12
        if "trainer" in where:
            # a step's plan and back are asked for together; a number each for the sums of an episode would be 60 trips
            assert int(loads) >= {"efe_forward_kernel": 30, "efe_finish_kernel": 30, "efe_backward_kernel": 10}[kernel]
            assert int(trips) <= {"efe_forward_kernel": 4, "efe_finish_kernel": 8, "efe_backward_kernel": 12}[kernel]
