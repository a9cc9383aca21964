"""The examples run and learn what they say; the one that the README opens with prints what README and docs show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def printed(name: str, code: int = 0) -> str:
    """Standard output of an example, run as a reader would."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}"],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def figures(name: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{name} (\d+\.?\d*)", text)]


def test_own_loop_learns():
    text = printed("own_loop.py")
    loss = figures("loss", text)
    assert loss[-1] < 0.8 * loss[0], text
    assert all(norm > 0 for norm in figures("core_grad", text) + figures("heads_grad", text))


def test_prompt_window_in_a_grpo_loop_learns_and_saves_passes():
    text = printed("prompt_window_grpo.py")
    reward = figures("reward", text)
    assert reward[-1] > reward[0] + 0.3, text
    # 60 batches of 6 prompts, some of them again in flush
    assert figures("prompts encoded", text)[-1] < 2 * 12 * 60 / 5


def settled(text: str) -> str:
    """Without what differs from machine to machine: times, digits behind the point, qualified names before 3.11."""
    text = re.sub(r"[+-]?\d+\.\d+(e[+-]\d+)?|\d+e-\d+", "#", text)
    return re.sub(r"(Prompted\.)?prompt\b", "prompt", text).strip()


@pytest.fixture(scope="module")
def broken_loop() -> str:
    """What the broken loop prints; its exit code says that it is broken."""
    return printed("prove_broken_loop.py", code=1)


def test_broken_loop_is_proved_broken(broken_loop):
    lines = (ROOT / "examples/prove_broken_loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    (cut,) = [number for number, line in enumerate(lines, 1) if ".detach()" in line]
    losses = figures("loss", broken_loop)
    # the loss falls all the same: that is why nobody notices
    assert losses[1] < losses[0] - 0.1
    assert "2 connected BROKEN      6 of 8 parameters get no gradient" in broken_loop
    # before python 3.11 a frame knows only the function's own name
    assert re.search(rf"at examples/prove_broken_loop\.py:{cut} in (Prompted\.)?prompt\n", broken_loop)


def test_worked_example_in_the_docs_is_what_the_script_prints(broken_loop):
    text = (ROOT / "docs/proof.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"\$ python examples/prove_broken_loop\.py\n(.*?)```", text, re.S)
    assert settled(shown) == settled(broken_loop)


def test_every_test_named_in_the_docs_is_there():
    text = (ROOT / "docs/proof.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)(?:\[[^`]*\])?`", text))
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 15 and not [name for name in names if f"def {name}(" not in known]
