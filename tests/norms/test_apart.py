"""Gradients that share memory are measured, and refused where they would be scaled twice; neighbours are scaled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen_fused import backends
from qwen_fused.norms.group_grad_norm import GroupGradNorm


def given(*gradients: Tensor) -> tuple[GroupGradNorm, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.zeros(gradient.shape)) for gradient in gradients]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    return GroupGradNorm({str(place): [p] for place, p in enumerate(parameters)}), parameters


def one_tensor() -> list[Tensor]:
    gradient = torch.full((4,), 3.0)
    return [torch.ones(2), gradient, gradient]


def two_views() -> list[Tensor]:
    gradient = torch.full((4,), 3.0)
    return [gradient[:], torch.ones(2), gradient[:]]


def in_part() -> list[Tensor]:
    memory = torch.full((6,), 3.0)
    return [memory[2:], torch.ones(2), memory[:4]]


def in_a_dense_one() -> list[Tensor]:
    memory = torch.full((4, 4), 3.0)
    return [memory, memory[1:, ::2], torch.ones(2)]


def same_columns() -> list[Tensor]:
    memory = torch.full((4, 4), 3.0)
    return [torch.ones(2), memory[:, :2], memory[:, :2]]


@pytest.mark.parametrize("case", [one_tensor, two_views, in_part, in_a_dense_one, same_columns])
def test_shared_memory_is_refused(gradient_path: str, case) -> None:
    gradients = case()
    before = [gradient.clone() for gradient in gradients]
    norms, _ = given(*gradients)
    stats = norms.measure()
    torch.testing.assert_close(stats.norm, torch.stack([gradient.norm() for gradient in before]))
    with pytest.raises(ValueError, match=r"gradients must lie in memory of their own to be scaled, got \d and \d"):
        norms.clip_(stats, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (0, 1)), ((3, 2), (1, 1)), ((2, 2, 2), (4, 2, 2))])
def test_a_gradient_that_overlaps_itself_is_refused(gradient_path: str, shape, strides) -> None:
    norms, _ = given(torch.ones(2), torch.ones(16).as_strided(shape, strides))
    with pytest.raises(ValueError, match="gradient 1 must not overlap itself to be scaled"):
        norms.clip_(norms.measure(), 0.1)


def neighbours() -> list[Tensor]:
    return list(torch.arange(1.0, 13).split([4, 0, 5, 3]))


def columns() -> list[Tensor]:
    return list(torch.arange(1.0, 13).view(3, 4).split(2, dim=1))


def strided() -> list[Tensor]:
    return [torch.arange(1.0, 13).view(3, 4).t()[::2], torch.ones(1, 3).expand(1, 3), torch.ones(5)[::2]]


def sign_aside() -> list[Tensor]:
    return [torch.view_as_complex(torch.ones(3, 2)).conj().imag, torch.ones(2)]


@pytest.mark.parametrize("case", [neighbours, columns, strided, sign_aside])
def test_what_is_apart_is_scaled_once(gradient_path: str, case) -> None:
    norms, parameters = given(*case())
    want = [p.grad * min(1.0, 0.1 / (float(p.grad.norm()) + 1e-6)) for p in parameters]
    norms.clip_(norms.measure(), 0.1)
    for p, right in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.grad.clone(), right, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not backends.HAS_EXTENSION, reason="plain torch writes where the factor is one too")
def test_what_is_not_scaled_may_share() -> None:
    """Nothing is written where no norm is above its bound."""
    shared = torch.ones(4)
    norms, _ = given(shared, shared)
    norms.clip_(norms.measure(), 10.0)
    assert torch.equal(shared, torch.ones(4))
