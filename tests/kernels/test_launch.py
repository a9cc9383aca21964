"""The launch table of the Triton loss: every device finds a row, and the tuner's choice fits into it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from efe_cases import ALL_TERMS, assert_agrees, in_float64, make_case, run, with_grad

from qwen_fused.kernels import efe_launch, efe_loss
from qwen_fused.kernels.efe_launch import Launch, Row, launch_row

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("capability", [70, 75, 80, 86, 89, 90, 100, 120])
def test_every_device_and_class_count_has_a_row(capability):
    for classes in range(1, 65):
        row = launch_row(classes, capability)
        assert row.measured and all(launch.cells & (launch.cells - 1) == 0 for launch in row[1:3])


def test_the_nearest_capability_below_is_taken(monkeypatch):
    one = Launch(8, 1)
    rows = {c: (Row(4, Launch(c, 1), one, ""), Row(64, Launch(2 * c, 1), one, "")) for c in (64, 128)}
    monkeypatch.setattr(efe_launch, "TABLE", rows)
    found = [launch_row(classes, c).forward.cells for classes, c in ((4, 127), (4, 128), (5, 300), (5, 1))]
    assert found == [64, 128, 256, 128]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is compiled")
def test_forward_and_backward_launch_as_the_row_says(monkeypatch):
    case = make_case(B=2, T=2, C=3, H=5, W=5)
    expected, grads = run(with_grad(in_float64(case)), weights=ALL_TERMS, backend="reference")
    asked = []

    def other(classes: int, capability: int) -> Row:
        asked.append(classes)
        return Row(64, Launch(16, 1), Launch(8, 1), "made up")

    monkeypatch.setattr(efe_loss, "launch_row", other)
    out, found = run(with_grad(case), weights=ALL_TERMS, backend="triton")
    assert asked == [3, 3]
    assert_agrees(out.loss.detach(), expected.loss.detach(), torch.float64, "loss")
    for name, grad in found.items():
        assert_agrees(grad, grads[name], torch.float64, name)


class Grids(list):
    """Stands for the kernels: their grids are kept, nothing runs."""

    def __getitem__(self, grid):
        self.append(grid)
        return lambda *arguments, **options: None


def test_no_grid_is_too_small_for_many_episodes(monkeypatch):
    grids = Grids()
    for kernel in (efe_loss.FORWARD, efe_loss.FINISH, efe_loss.BACKWARD):
        monkeypatch.setattr(kernel, "jitted", grids)
    inputs = (torch.zeros(70_000, 1, 2, 1, 1), torch.zeros(70_000, 1, 1, dtype=torch.long), *(None,) * 8)
    on = (True, False, False, False, False, False)
    options = (on, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.5, 2, -100)
    out = efe_loss._forward(*inputs, *options)
    efe_loss._backward(out[0], *inputs, *out[3:], *options, (True,) * 5)
    # what CUDA allows in each dimension
    for grid in map(tuple, list(grids)):
        assert all(size <= most for size, most in zip(grid, (2**31 - 1, 65_535, 65_535), strict=False)), grid
    assert len(grids) == 3


def test_the_tuner_takes_the_fastest_over_all_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from tune_efe_loss import best, candidates

    a, b, c = Launch(32, 1), Launch(64, 1), Launch(64, 2)
    # b is fastest in one case and slow in the other; c did not compile in one
    chosen, ratio = best([{a: 2.0, b: 1.0, c: 0.1}, {a: 2.0, b: 8.0}], a)
    assert (chosen, ratio) == (a, 1.0)
    chosen, ratio = best([{a: 2.0, b: 1.0}, {a: 2.0, b: 2.0}], a)
    assert chosen == b and ratio == pytest.approx(0.5**0.5)
    tried = candidates()
    assert len(tried) == len(set(tried))
    for row in efe_launch.TABLE[80]:
        assert row.forward in tried and row.backward in tried


def test_the_tuner_needs_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(BENCH / "tune_efe_loss.py")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "tune_efe_loss: a CUDA device must be there, got none"
