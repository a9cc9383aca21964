"""The Triton loss as an implementation of the op that has its node in C++: interpreted, it stands in for CUDA's here.

On a GPU the same is what `fused` tests; what only a real launch can show is in tests/loss/test_efe_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from efe_cases import ALL_TERMS, check, make_case, op_arguments, with_grad
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_fused import backends
from qwen_fused.loss.autograd import HARD_MODE
from qwen_fused.loss.dispatch import COMPILED
from qwen_fused.loss.efe_loss import efe_loss

pytestmark = [
    pytest.mark.skipif(not COMPILED, reason=f"no extension: {backends.EXTENSION_ERROR}"),
    pytest.mark.skipif(not backends.HAS_TRITON, reason=f"no Triton: {backends.TRITON_ERROR}"),
]
NODE = {"backend": "cpp", "device": "cpu"}


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[str]]:
    """Names of the passes that ran in Triton, in place of the C++ ones."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton is compiled")
    from qwen_fused.kernels import efe_loss as triton_loss

    ran: list[str] = []

    def told(name, function):
        def call(*args):
            ran.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(triton_loss, "_forward", told("forward", triton_loss._forward))
    monkeypatch.setattr(triton_loss, "_backward", told("backward", triton_loss._backward))
    library = triton_loss.implement("CPU")
    yield ran
    library._destroy()


@pytest.mark.filterwarnings("ignore:.*[Oo]verrid")
@pytest.mark.parametrize("hard_mode", HARD_MODE)
def test_agrees_with_the_reference(calls, hard_mode):
    check(make_case(T=2), NODE, weights=ALL_TERMS, hard_mode=hard_mode, hard_floor=0.3)
    assert calls == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore:.*[Oo]verrid")
def test_inputs_without_a_gradient_get_none(calls):
    case = with_grad(make_case(T=1, H=2, W=2))
    case["back_logits"] = case["back_logits"].detach()
    out = efe_loss(**case, weights=ALL_TERMS, backend="cpp")
    out.loss.backward()
    assert case["back_logits"].grad is None and case["plan_logits"].grad is not None
    assert calls == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore:.*[Oo]verrid")
def test_no_second_derivative(calls):
    case = with_grad(make_case(T=1, H=2, W=2))
    loss = efe_loss(**case, weights=ALL_TERMS, backend="cpp").loss
    (grad,) = torch.autograd.grad(loss, case["plan_logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in its fused backends"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*[Oo]verrid")
def test_takes_a_plan_of_five_axes_alone(calls):
    arguments = list(op_arguments(make_case()))
    arguments[0] = arguments[0][:, 0]
    with pytest.raises(ValueError, match="plan must be .B, T, C, H, W. on cpu, got"):
        torch.ops.qwen_fused.efe_loss(*arguments)


def test_the_compiled_op_is_itself_again():
    """What the fixture changed must not outlive it: the C++ op takes one step without its axis, Triton's does not."""
    arguments = list(op_arguments(make_case(T=1)))
    arguments[0], arguments[2] = arguments[0][:, 0], arguments[2][:, 0]
    assert torch.ops.qwen_fused.efe_loss(*arguments)[0].isfinite()


class Names(TorchDispatchMode):
    """Keeps the names of the ops that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


def test_cuda_tensors_go_to_the_op_with_its_node_in_cpp():
    """No device is asked: the tensors are fake."""
    case = make_case()
    with FakeTensorMode(), Names() as names:
        fake = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in case.items()}
        loss = efe_loss(**fake, weights=ALL_TERMS, backend="triton").loss
    assert loss.device.type == "cuda" and "qwen_fused::efe_loss" in names.seen
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qwen_fused::efe_loss", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qwen_fused::efe_loss_backward", "CUDA")
