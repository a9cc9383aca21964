"""The cross-entropy alone: every shape, layout and reduction against torch's own and against the specification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import assert_agrees

from qwen_fused.loss.cross_entropy import REDUCTIONS, hard_cell_cross_entropy

HARD = ["episode", "cell", "none"]


def made(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, a target of which a fifth is ignored, and class weights."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = -100
    weight = torch.rand(shape[1], generator=g, dtype=torch.float64).to(dtype) + 0.1
    return logits.to(device), target.to(device), weight.to(device)


def check(logits, target, weight, fused, **options) -> None:
    """Loss, reports and gradient of the fused backend against the reference in float64; strides are kept."""
    wide = logits.detach().double().cpu().requires_grad_()
    right = hard_cell_cross_entropy(
        wide, target.cpu(), class_weight=weight.double().cpu(), backend="reference", **options
    )
    (expected,) = torch.autograd.grad(right.loss.sum(), wide)
    leaf = logits.detach().requires_grad_()
    assert leaf.stride() == logits.stride()
    out = hard_cell_cross_entropy(leaf, target, class_weight=weight, backend=fused["backend"], **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    value = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert_agrees(out.loss.detach(), right.loss.detach(), value, "loss")
    assert_agrees(grad, expected, logits.dtype, "gradient")
    assert grad.dtype == logits.dtype and grad.stride() == torch.empty_like(leaf).stride()
    for name in ("hard_ratio", "accuracy"):
        assert_agrees(getattr(out, name), getattr(right, name), value, name)
    assert out.terms.keys() == right.terms.keys() == {"ce", "hard"}
    assert_agrees(out.terms["ce"], right.terms["ce"], value, "ce")
    assert torch.equal(out.solved.cpu(), right.solved) and torch.equal(out.predicted.cpu(), right.predicted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 10, 16, 17, 40, 64])
def test_rows_of_classes(fused, classes, dtype):
    """Class last: squares of rows are turned, the last one over the end of the one before; 37 cells fill no vector."""
    if fused["device"] == "cuda" and classes > 16:
        pytest.skip("compiles for minutes")
    check(*made((37, classes), dtype, fused["device"]), fused, hard_mode="episode")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "every other", "a column"])
def test_layouts(fused, layout, dtype):
    logits, target, weight = made((2, 20, 5, 7) if layout != "a column" else (2, 20, 35, 1), dtype, fused["device"])
    if fused["device"] == "cuda":
        pytest.skip("compiles for minutes")
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    if layout == "every other":
        logits = torch.stack([logits, logits.flip(1)], 2)[:, :, 0]
    check(logits, target, weight, fused, hard_mode="cell")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 65504.0, 6e-8, 1.1, -0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_numbers_of_every_kind(fused, dtype, value):
    """What converts a vector at a time has the same result as one number after another."""
    logits = torch.linspace(-1, 1, 18 * 20, dtype=dtype).view(18, 20)
    logits[3, 4] = value
    target = torch.full((18,), 7)
    target[5] = -100
    found = logits.to(fused["device"]).requires_grad_()
    loss = hard_cell_cross_entropy(found, target.to(fused["device"]), hard_mode="none", backend=fused["backend"]).loss
    (grad,) = torch.autograd.grad(loss, found)
    wide = logits.float().requires_grad_()
    expected = F.cross_entropy(wide, target)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    right = torch.autograd.grad(expected, wide)[0].to(dtype)
    torch.testing.assert_close(grad.cpu(), right, rtol=torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("hard_mode", HARD)
@pytest.mark.parametrize("shape", [(30, 5), (3, 5, 4, 4)])
def test_reductions_add_up(fused, shape, hard_mode):
    """Cells to episodes, episodes to the mean; gradients too."""
    logits, target, weight = made(shape, torch.float64, fused["device"])
    target.view(shape[0], -1)[1] = -100
    logits.requires_grad_()
    found = {
        name: hard_cell_cross_entropy(
            logits, target, class_weight=weight, hard_mode=hard_mode, reduction=name, backend=fused["backend"]
        )
        for name in REDUCTIONS
    }
    cells, episodes, mean = (found[name].loss for name in ("none", "episode", "mean"))
    assert cells.shape == target.shape and (cells[target == -100] == 0).all()
    assert episodes.shape == found["mean"].hard_ratio.shape
    valid = target != -100
    kappa = torch.where(valid, weight[target.clamp_min(0)], 0.0).reshape(episodes.shape[0], -1).sum(1)
    by_hand = torch.where(kappa > 0, cells.reshape(episodes.shape[0], -1).sum(1) / kappa.clamp_min(1e-9), 0.0)
    torch.testing.assert_close(episodes, by_hand)
    counting = valid.reshape(episodes.shape[0], -1).any(1)
    torch.testing.assert_close(mean, episodes[counting].mean())
    one, other = (torch.autograd.grad(x, logits)[0] for x in (mean, episodes[counting].mean()))
    torch.testing.assert_close(one, other)
    for name in ("hard_ratio", "accuracy", "solved", "predicted"):
        assert torch.equal(getattr(found["none"], name), getattr(found["mean"], name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_cell_is_torchs(fused, dtype):
    logits, target, weight = made((50, 7), dtype, fused["device"])
    options = {"hard_mode": "none", "reduction": "none", "backend": fused["backend"]}
    found = hard_cell_cross_entropy(logits, target, class_weight=weight, **options).loss
    torch.testing.assert_close(found, F.cross_entropy(logits, target, weight=weight, reduction="none"))
    found = hard_cell_cross_entropy(logits[:, :, None, None], target[:, None, None], **options).loss
    torch.testing.assert_close(found[:, 0, 0], F.cross_entropy(logits, target, reduction="none"))


def test_a_forbidden_target_of_no_weight_is_no_cost(fused):
    logits, target = torch.zeros(4, 3, device=fused["device"]), torch.tensor([0, 1, 2, 0], device=fused["device"])
    logits[1, 1] = -torch.inf
    weight = torch.tensor([1.0, 0.0, 1.0], device=fused["device"])
    for reduction in REDUCTIONS:
        out = hard_cell_cross_entropy(
            logits, target, class_weight=weight, reduction=reduction, backend=fused["backend"]
        )
        assert out.loss.isfinite().all()
