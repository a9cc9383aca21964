"""Random launches, by Triton and past it: libcuda is asked for the same, to the byte (launch_sweep.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_fused import backends

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not backends.HAS_TRITON, reason=f"no Triton: {backends.TRITON_ERROR}"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its own libcuda is loaded"),
]


def sweep(*options: str) -> dict[str, Any]:
    """What the script prints; no launch differed."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    line = [sys.executable, str(ROOT / "tests" / "helpers" / "launch_sweep.py"), *options]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(done.stdout)
    # a key for each kernel that was launched past Triton, and what is kept outlives Triton's own cache
    assert found["faults"] == 0 and found["keys"] == found["kernels"] and found["alone"]
    return found


def test_launches_are_tritons_own():
    found = sweep("--sets", "3", "--calls", "6")
    assert found["direct"] > 30 and found["by Triton"]


@pytest.mark.slow
def test_thousands_of_launches_are_tritons_own():
    found = sweep("--sets", "80", "--calls", "40", "--seed", "1")
    assert found["direct"] > 5000 and found["by Triton"] > 100


@pytest.mark.slow
def test_compiled_kernels_take_what_their_signature_says():
    assert sweep("--sets", "3", "--calls", "4", "--seed", "2", "--compile")["direct"]
