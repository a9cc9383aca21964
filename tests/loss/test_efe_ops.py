"""The ops of the fused loss called past their public function: they check for themselves, and leave out what is off."""

from __future__ import annotations

import pytest
import torch
from efe_cases import make_case, op_arguments, op_name, with_grad

from qwen_fused.loss import efe_loss as ops
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss

BAD_OP_INPUT = [
    (0, lambda x: x[0], "plan must be .B, T, C, H, W."),
    (0, lambda x: None, "plan must be a dense tensor on the CPU, got None"),
    (1, lambda x: x[:, :1], "target must be .B, H, W."),
    (1, lambda x: x.float(), "target must be an integer tensor"),
    (2, lambda x: x[:1], "back must be"),
    (3, lambda x: x.int(), "preference must be float16"),
    (7, lambda x: x[:1], "step_weight must be"),
    (9, lambda x: x[:2], "weights must hold 6 numbers, got 2"),
    (11, lambda x: 5, "hard_mode must be 0, 1 or 2, got 5"),
]


@pytest.mark.skipif(not ops.COMPILED, reason=f"no extension: {ops.backends.EXTENSION_ERROR}")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("place", "spoil", "message"), BAD_OP_INPUT)
def test_the_compiled_op_checks_for_itself(place, spoil, message, grad):
    """Called past the public function, it must not read out of bounds; nor must its node, where there is one."""
    arguments = list(op_arguments(make_case()))
    arguments[place] = spoil(arguments[place])
    for x in arguments[: 7 if grad else 0]:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    with pytest.raises(ValueError, match=message):
        torch.ops.qwen_fused.efe_loss(*arguments)


@pytest.mark.skipif(not ops.COMPILED, reason=f"no extension: {ops.backends.EXTENSION_ERROR}")
@pytest.mark.parametrize("grad", [False, True])
def test_the_compiled_op_takes_no_nested_plan(grad):
    """Torch says so itself, where no node looks at sizes first."""
    arguments = list(op_arguments(make_case()))
    arguments[0] = torch.nested.nested_tensor([*arguments[0]], requires_grad=grad)
    with pytest.raises(NotImplementedError, match="efe_loss.*NestedTensorCPU"):
        torch.ops.qwen_fused.efe_loss(*arguments)


@pytest.mark.parametrize("off", ["ce", "risk", "ambiguity", "agreement", "anchor", "prompt"])
def test_the_op_leaves_out_a_term_of_weight_0(fused, off):
    """The public function drops its input before. Here its column is 0, but the cross-entropy's; gradients hold."""
    arguments = list(op_arguments(with_grad(make_case(T=2, dtype=torch.float32), fused["device"])))
    names = ["ce", "risk", "ambiguity", "agreement", "anchor", "prompt"]
    arguments[9] = [0.0 if name == off else weight for name, weight in zip(names, arguments[9], strict=True)]
    out = getattr(torch.ops.qwen_fused, op_name(fused))(*arguments)
    assert out[1][:, names.index(off)].any() == (off == "ce") and out[1].isfinite().all()
    out[0].backward()
    terms = {name: weight for name, weight in zip(names, arguments[9], strict=True)}
    case = with_grad(make_case(T=2, dtype=torch.float32))
    expected = efe_loss(**case, weights=EFEWeights(**terms), backend="reference", hard_mode="cell", hard_floor=0.3)
    expected.loss.backward()
    for x, y in zip(arguments[:7], list(case.values())[:7], strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=1e-4, atol=1e-6)
