"""The example that the README opens with says what the README says it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "prove_broken_loop.py"


def test_broken_loop_is_proved_broken():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 40
    (cut,) = [number for number, line in enumerate(lines, 1) if ".detach()" in line]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=EXAMPLE.parents[1],
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
    )
    assert done.returncode == 1, done.stderr
    losses = [float(found) for found in re.findall(r"loss (\d\.\d+)", done.stdout)]
    # the loss falls all the same: that is why nobody notices
    assert losses[1] < losses[0] - 0.1
    assert "2 connected BROKEN      6 of 8 parameters get no gradient" in done.stdout
    # before python 3.11 a frame knows only the function's own name
    assert re.search(rf"at examples/prove_broken_loop\.py:{cut} in (Prompted\.)?prompt\n", done.stdout)
