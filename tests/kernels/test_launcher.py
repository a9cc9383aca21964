"""Launches past Triton's launcher: the same arguments to the same kernels, three a call, and few kernels in all."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_fused import backends

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason=f"no Triton: {backends.TRITON_ERROR}")


@functools.cache
def probe() -> dict[str, Any]:
    """What tests/helpers/launch_probe.py prints."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    line = [sys.executable, str(ROOT / "tests" / "helpers" / "launch_probe.py")]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    # the profiler may write lines of its own
    return json.loads(done.stdout.splitlines()[-1])


def test_this_triton_is_one_that_is_known():
    assert probe()["not_direct"] is None


def test_three_launches_a_call():
    names = [name for name, _ in probe()["launches"]]
    assert names == ["efe_forward_kernel", "efe_finish_kernel", "efe_backward_kernel"] * 3


def test_later_launches_have_the_arguments_of_tritons_own():
    """But addresses of memory that each call allocates, and what Triton tells its hooks."""
    launches = [arguments for _, arguments in probe()["launches"]]
    compared = 0
    for first, second, third in zip(launches[:3], launches[3:6], launches[6:], strict=True):
        assert len(first) == len(second)
        for place, (own, past) in enumerate(zip(first, second, strict=True)):
            # metadata for hooks, and the hooks: none is set
            if place in (6, 7, 8):
                assert past is None
                continue
            # allocated anew
            if isinstance(own, int) and own > 2**32 and own != past:
                assert isinstance(past, int) and past > 2**32 and past % 4 == own % 4
                continue
            assert past == own, place
            compared += 1
        assert [x for x in second if not isinstance(x, int)] == [x for x in third if not isinstance(x, int)]
    assert compared > 100


def test_each_kernel_is_compiled_once():
    assert probe()["compiled"] == [1, 1, 1]


def test_nothing_but_memory_is_asked_of_torch():
    """Eleven of forward's outputs and workspaces and the five gradients, without a copy."""
    assert set(probe()["ops"]) <= {
        "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided",
    }  # fmt: skip
    assert probe()["allocations"] == 16


def test_a_stride_beyond_int32_is_tritons(monkeypatch):
    """It compiles a kernel of its own for it; what is kept by key must not be called with it."""
    compiled, launches = probe()["far"]
    assert compiled[0] == compiled[2] == 1 and launches == 3


def test_few_kernels_serve_every_canvas_and_batch():
    """Forward and backward one each, finishing two: a run must not stop to compile with each new size of grid."""
    assert probe()["variants"] <= 4


def test_a_key_stands_for_one_kernel():
    """By what Triton itself would tell apart, memory of any order included: else one runs that was made for others."""
    assert probe()["ambiguous"] == 0


def test_another_triton_launches_by_itself(monkeypatch):
    from qwen_fused.kernels import launcher

    monkeypatch.setattr(launcher, "LAUNCH", "kernel.start(grid)")
    reason = launcher._why_not_direct()
    assert reason is not None and "launches in a way that is not known here" in reason
    monkeypatch.setattr(launcher, "NOT_DIRECT", reason)
    calls = []

    class Jitted:
        def __getitem__(self, grid):
            return lambda *arguments, **options: calls.append(grid) or self

    import torch

    kernel = launcher.Kernel(Jitted())
    for _ in range(2):
        kernel(7, (torch.zeros(1), None), (None,), (1,), (), 1)
    assert calls == [(7,), (7,)] and not kernel.compiled
    assert backends._launches() == f"by its own launcher: {reason}"


def test_whoever_is_told_of_launches_is_told_by_triton(monkeypatch):
    """By a chain of hooks, or by a function in a chain's place as in older profilers."""
    from qwen_fused.kernels import launcher

    hooks = launcher.triton.knobs.runtime
    assert not launcher._is_hooked()
    monkeypatch.setattr(hooks, "launch_exit_hook", None)
    assert not launcher._is_hooked()
    monkeypatch.setattr(hooks, "launch_exit_hook", print)
    assert launcher._is_hooked()
    monkeypatch.undo()
    hooks.launch_enter_hook.add(print)
    try:
        assert launcher._is_hooked()
    finally:
        hooks.launch_enter_hook.remove(print)
    assert not launcher._is_hooked()
