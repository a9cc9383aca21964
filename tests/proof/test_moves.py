"""Moving parameters along directions: what the plain formula says, whatever the layout and the blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qwen_fused as qf
from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.moves import NOISE_BLOCK, WIDENED, ExactValue, Noise


@pytest.mark.parametrize("count", [1, WIDENED, 2 * WIDENED + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_sum_is_the_plain_one(count: int, dtype: torch.dtype) -> None:
    base, direction = torch.randn(count).to(dtype), torch.randn(count)
    exact = ExactValue(base, direction, 1e-5, torch.float64)()
    # with one rounding or two: kernels differ in whether they fuse
    torch.testing.assert_close(exact, base.double() + 1e-5 * direction.double(), rtol=4e-16, atol=1e-21)


@pytest.mark.parametrize("shape", [(3, 5), (NOISE_BLOCK + 2, 3)])
def test_noise_is_the_same_in_any_layout(shape: tuple[int, int]) -> None:
    plain, turned = torch.zeros(shape), torch.zeros(shape[::-1]).t()
    Noise(3).add_to(plain, 0.5)
    Noise(3).add_to(turned, 0.5)
    assert torch.equal(plain, turned) and plain.count_nonzero() == plain.numel()
    assert 0.4 < float(plain.std()) < 0.6 or shape == (3, 5)


def test_loss_between_two_ends_costs_no_evaluation_of_its_own() -> None:
    weight = torch.ones(4, dtype=torch.float32)
    asked = []

    def loss(values):
        asked.append(values)
        return float(values[id(weight)]().square().sum())

    lines = Directions({"w": weight}, {"w": 2 * weight}, loss, torch.float32, torch.float64, 0)
    assert lines.between(4.0) == pytest.approx(4.0, rel=1e-9)
    assert lines.check(0).ok and len(asked) == 2
    assert lines.here(exactly=True) == 4.0 and len(asked) == 3


def test_hook_that_changes_a_delivered_gradient_reaches_no_other_rung() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 3)

    def damp(parameter):
        parameter.grad.mul_(0.9)

    net.weight.register_post_accumulate_grad_hook(damp)
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    report = qf.prove(lambda: F.cross_entropy(net(x), y), net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert report.rungs["correct"].ok, report
