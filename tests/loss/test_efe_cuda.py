"""The Triton loss on a CUDA device: on any stream and device, inside a CUDA graph, under autocast and a loss scale.

Values against float64 are test_efe_loss.py's. Every body runs under Triton's interpreter too, see devices.py.
"""

from __future__ import annotations

import pytest
import torch
from devices import SECOND, TRITON, in_use, late_stream, record, repeats, synchronize
from efe_cases import ALL_TERMS, DIFFERENTIABLE, assert_agrees, gradients, in_float64, make_case, run, with_grad
from torch import Tensor, nn

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import efe_loss

device = pytest.mark.parametrize("device", TRITON)
# the interpreter takes its time
SMALL = dict(B=2, T=2, C=3, H=2, W=3, dtype=torch.float32)


def check(case: dict[str, Tensor], loss: Tensor, grads: dict[str, Tensor], upstream: float = 1.0) -> None:
    """Loss and gradients against the specification in float64, for inputs of float32."""
    expected, expected_grads = run(with_grad(in_float64(case)), upstream, weights=ALL_TERMS, backend="reference")
    assert_agrees(loss.detach(), expected.loss.detach(), torch.float32, "loss")
    for name, grad in grads.items():
        assert_agrees(grad, expected_grads[name], torch.float32, name)


@device
def test_works_on_the_current_stream(device: torch.device) -> None:
    case = make_case(**SMALL)
    fresh = with_grad(case, device.type)
    late = {n: x.detach().clone().fill_(torch.nan) if n in DIFFERENTIABLE else x for n, x in fresh.items()}
    late = with_grad(late, device.type)
    # compiled before the race begins
    run(fresh, weights=ALL_TERMS, backend="triton")
    synchronize(device)
    with late_stream(device):
        with torch.no_grad():
            for name in DIFFERENTIABLE:
                late[name].copy_(fresh[name])
        out = efe_loss(**late, weights=ALL_TERMS, backend="triton")
        out.loss.backward()
    check(case, out.loss, gradients(late))


@pytest.mark.parametrize("second", SECOND)
def test_works_on_a_device_that_is_not_the_current_one(second: torch.device) -> None:
    if second.type == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton is compiled")
    case = make_case(**SMALL)
    leaves = with_grad(case, str(second))
    out, grads = run(leaves, weights=ALL_TERMS, backend="triton")
    assert out.loss.device == out.predicted.device == leaves["plan_logits"].device
    check(case, out.loss, grads)


@device
def test_graph_reads_its_inputs_anew(device: torch.device) -> None:
    leaves = with_grad(make_case(**SMALL), device.type)

    def body() -> tuple[Tensor, ...]:
        for x in leaves.values():
            x.grad = None
        out = efe_loss(**leaves, weights=ALL_TERMS, backend="triton")
        out.loss.backward()
        return out.loss.detach(), *gradients(leaves).values()

    (loss, *grads), replay = record(device, body)
    for seed in (1, 2):
        case = make_case(**SMALL, seed=seed)
        with torch.no_grad():
            for name, x in leaves.items():
                x.copy_(case[name])
        replay()
        check(case, loss, dict(zip(gradients(leaves), grads, strict=True)))


@device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_logits_train_float32_weights(device: torch.device, dtype: torch.dtype) -> None:
    """A convolution under autocast, and the loss beside it: against the same logits handed over by hand."""
    target = make_case(B=2, C=5, H=4, W=3)["target"].to(device)
    x = torch.randn(2, 4, 4, 3, device=device)
    readout = nn.Conv2d(4, 5, 1, device=device)
    with torch.autocast(device.type, dtype=dtype):
        logits = readout(x)
        out = hard_cell_cross_entropy(logits, target, backend="triton")
    assert logits.dtype == dtype and out.loss.dtype == torch.float32
    out.loss.backward()
    plain = logits.detach().double().requires_grad_()
    expected = hard_cell_cross_entropy(plain, target, backend="reference")
    expected.loss.backward()
    assert_agrees(out.loss.detach(), expected.loss.detach().cpu(), torch.float32, "loss")
    # the logits' gradient comes back in their own type, and the convolution multiplies in it
    weight = torch.einsum("bchw,bdhw->cd", plain.grad, x.double())
    scale = weight.abs().max().item()
    error = (readout.weight.grad[..., 0, 0].double() - weight).abs().max().item()
    assert error < 4 * torch.finfo(dtype).eps * scale
    assert readout.weight.grad.dtype == torch.float32


@device
def test_loss_scale_passes_through_and_overflow_shows(device: torch.device) -> None:
    case = make_case(**SMALL)
    leaves = with_grad(case, device.type)
    upstream = torch.full((), 2.0**16, device=device)
    (upstream * efe_loss(**leaves, weights=ALL_TERMS, backend="triton").loss).backward()
    expected = run(with_grad(in_float64(case)), 2.0**16, weights=ALL_TERMS, backend="reference")[1]
    for name, grad in gradients(leaves).items():
        assert_agrees(grad, expected[name], torch.float32, name)
    # of float16 logits, such a scale leaves the range: the scaler must be able to see it
    narrow = with_grad({n: x.half() if n == "plan_logits" else x for n, x in case.items()}, device.type)
    (upstream * 2.0**16 * efe_loss(**narrow, weights=ALL_TERMS, backend="triton").loss).backward()
    assert narrow["plan_logits"].grad.dtype == torch.float16
    assert narrow["plan_logits"].grad.isinf().any()


@device
def test_more_episodes_than_a_grid_has_rows(device: torch.device) -> None:
    # CUDA's second dimension holds 65,535 programs
    episodes = 70_000 if device.type == "cuda" else 5
    logits = torch.randn(episodes, 3, 1, 1, device=device, requires_grad=True)
    target = torch.randint(0, 3, (episodes, 1, 1), device=device)
    loss = hard_cell_cross_entropy(logits, target, hard_mode="none", backend="triton").loss
    (grad,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().double().requires_grad_()
    expected = nn.functional.cross_entropy(wide, target)
    (expected_grad,) = torch.autograd.grad(expected, wide)
    assert_agrees(loss.detach(), expected.detach(), torch.float32, "loss")
    assert_agrees(episodes * grad, episodes * expected_grad, torch.float32, "gradient")


@device
def test_leaks_nothing(device: torch.device) -> None:
    leaves = with_grad(make_case(**SMALL), device.type)

    def step() -> None:
        for x in leaves.values():
            x.grad = None
        efe_loss(**leaves, weights=ALL_TERMS, backend="triton").loss.backward()

    step()
    before = in_use(device)
    for _ in range(repeats(device)):
        step()
    # fewer where what another test left is gone by now
    assert in_use(device) <= before
