"""The ops of the fused loss called past their public function: they check for themselves, and leave out what is off."""

from __future__ import annotations

import pytest
import torch
from efe_cases import make_case, op_arguments, op_name, with_grad

from qwen_fused.kernels.reference import TERMS
from qwen_fused.loss import dispatch as ops
from qwen_fused.loss.autograd import ARGUMENTS
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss

BAD_OP_INPUT = [
    (0, lambda x: x[0, 0], "plan must be .B, T, C, H, W., .B, C, H, W. or .N, C., got"),
    (0, lambda x: x[0], "target must be .B, H, W., got"),
    (0, lambda x: x[0, 0, 0], "target must be .N., got"),
    (0, lambda x: None, "plan must be a dense tensor on the CPU, got None"),
    (1, lambda x: x[:, :1], "target must be .B, H, W."),
    (1, lambda x: x.float(), "target must be an integer tensor"),
    (2, lambda x: x[:1], "back must be"),
    (3, lambda x: x.int(), "preference must be float16"),
    (7, lambda x: x[:1], "step_weight must be"),
    (2, lambda x: None, "back must be there where the term agreement is on, got None"),
    (3, lambda x: None, "preference must be there where the term risk or anchor is on, got None"),
    (11, lambda x: x[:2], "weights must hold 6 numbers, got 2"),
    (13, lambda x: 5, "hard_mode must be 0, 1 or 2, got 5"),
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


@pytest.mark.parametrize("off", TERMS)
def test_the_op_leaves_out_a_term_that_is_off(fused, off):
    """Whatever its weight and its inputs. Its column is 0, but the cross-entropy's; gradients hold."""
    case = make_case(T=2, dtype=torch.float32)
    arguments = list(op_arguments(with_grad(case, fused["device"])))
    arguments[10] = [name != off for name in TERMS]
    out = getattr(torch.ops.qwen_fused, op_name(fused))(*arguments)
    assert out[1][:, TERMS.index(off)].any() == (off == "ce") and out[1].isfinite().all()
    out[0].backward()
    terms = {name: weight if name != off else 0.0 for name, weight in zip(TERMS, arguments[11], strict=True)}
    case = with_grad(case)
    expected = efe_loss(**case, weights=EFEWeights(**terms), backend="reference", hard_mode="cell", hard_floor=0.3)
    expected.loss.backward()
    for x, y in zip(arguments[:7], list(case.values())[:7], strict=True):
        assert (x is None or x.grad is None) == (y.grad is None)
        if y.grad is not None:
            torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not (ops.COMPILED and ops.backends.HAS_TRITON), reason="one of the two is not here")
@pytest.mark.parametrize("direction", ["", "_backward"])
def test_the_triton_ops_have_the_schema_of_the_compiled_ones(direction):
    """Arguments reach either by name: names, types and defaults must be the same, and what comes back too."""
    compiled, triton = (
        getattr(torch.ops.qwen_fused, f"{name}{direction}").default._schema for name in ("efe_loss", "efe_loss_triton")
    )
    assert str(compiled).partition("(")[2] == str(triton).partition("(")[2]
    names = [argument.name for argument in compiled.arguments]
    assert names[names.index("plan") :][: len(ARGUMENTS)] == [*ARGUMENTS]
