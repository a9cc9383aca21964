"""A clip is a write that autograd knows of, and stats scale the gradients they were measured on, once."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import lay_out, parameter
from torch import Tensor

from qwen_fused.norms.group_grad_norm import GroupGradNorm


def clip(parameters: list, bound: float = 1.0, inv_scale: float | None = None) -> None:
    norms = GroupGradNorm({"p": parameters})
    norms.clip_(norms.measure(inv_scale), bound)


def second_order(change) -> Tensor:
    """A gradient of a gradient, whose saved first one `change` is given in between."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = torch.autograd.grad((w * torch.tensor([3.0, 4.0])).square().sum(), w, create_graph=True)
    outer = first.square().sum()
    p = parameter(first.detach())
    change([p])
    outer.backward()
    return w.grad


@pytest.mark.parametrize("how", [dict(bound=1.0), dict(bound=float("inf"), inv_scale=0.5)])
def test_a_saved_gradient_is_not_used_stale(gradient_path: str, how: dict) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second_order(lambda parameters: clip(parameters, **how))


def test_one_that_is_left_as_it_is_may_be_used() -> None:
    torch.testing.assert_close(second_order(lambda p: clip(p, 1e9)), second_order(lambda _: None))


@pytest.mark.parametrize("layout", ["plain", "transposed", "channels_last", "holes", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_layout_counts_its_write(gradient_path: str, dtype: torch.dtype, layout: str) -> None:
    p = parameter(lay_out(torch.ones(50, dtype=dtype), layout))
    version = p.grad._version
    clip([p], 1e-3)
    assert p.grad._version > version


def test_stats_scale_once(gradient_path: str) -> None:
    p = parameter(torch.tensor([1024.0]))
    norms = GroupGradNorm({"p": [p]})
    stats, before = norms.measure(1 / 1024), norms.measure(1 / 1024)
    norms.clip_(stats, 10.0)
    for spent in (stats, before):
        with pytest.raises(RuntimeError, match="stats must be measured anew: clip_ has scaled the gradients since"):
            norms.clip_(spent, 10.0)
    assert p.grad.item() == 1.0
    norms.clip_(norms.measure(), 0.5)
    assert p.grad.item() == pytest.approx(0.5, rel=1e-5)


def test_a_refused_clip_leaves_the_stats_to_be_used(gradient_path: str) -> None:
    p = parameter(torch.tensor([4.0]))
    norms = GroupGradNorm({"p": [p]})
    stats = norms.measure()
    with pytest.raises(ValueError, match="max_norm"):
        norms.clip_(stats, -1.0)
    norms.clip_(stats, 1.0)
    assert p.grad.item() == pytest.approx(1.0)


def test_stats_of_another_are_refused() -> None:
    p = parameter(torch.tensor([4.0]))
    one, other = GroupGradNorm({"a": [p]}), GroupGradNorm({"a": [p]})
    with pytest.raises(ValueError, match=r"stats must be what this GroupGradNorm measured, .* got another's"):
        one.clip_(other.measure(), 1.0)
    assert p.grad.item() == 4.0


def test_inside_inference_mode(gradient_path: str) -> None:
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), 2.0)
        clip([p], 1.0)
        assert float(p.grad.norm()) == pytest.approx(1.0)
