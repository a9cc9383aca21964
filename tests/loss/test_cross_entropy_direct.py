"""The direct way to the cross-entropy, past the dispatcher: taken by plain tensors, with the same result, and no more.

What has to be seen by somebody (a mode, a transform, a subclass, a wrong argument) goes by the op or by the checks.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, graph
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_fused.loss import cross_entropy as module
from qwen_fused.loss.autograd import HARD_MODE
from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy

pytestmark = pytest.mark.skipif(module.DIRECT is None, reason="the extension is not here, or older")
MODES = ["episode", "cell", "none"]


def direct(logits, target, class_weight=None, hard_floor=0.3, hard_mode="none", ignore_index=-100):
    return module.DIRECT(logits, target, class_weight, hard_floor, hard_mode, ignore_index)


def inputs(shape=(6, 5), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    return logits, torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hard_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4), (0, 5), (1, 1, 30, 30)])
def test_is_the_op_bit_for_bit(shape, dtype, hard_mode, grad):
    logits, target = inputs(shape, dtype)
    weight = torch.linspace(0.5, 2, shape[1])
    with torch.set_grad_enabled(grad):
        found = direct(logits, target, weight, 0.3, hard_mode)
        loss, ce, hard, accuracy, solved, predicted = torch.ops.qwen_fused.hard_cell_cross_entropy(
            logits, target, weight, 0.3, HARD_MODE[hard_mode], -100
        )
    assert found is not None
    expected = (loss, {"ce": ce, "hard": hard}, hard, accuracy, solved, predicted)
    for x, y in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
    assert found[1].keys() == expected[1].keys() and all(torch.equal(found[1][k], expected[1][k]) for k in found[1])
    assert [x.requires_grad for x in (*found[:1], *found[2:])] == [grad] + [False] * 4
    if grad:
        assert torch.equal(*(torch.autograd.grad(3 * x[0], logits)[0] for x in (found, expected)))


def test_is_the_way_of_plain_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "DIRECT", lambda *given: calls.append(given))
    logits, target = inputs()
    hard_cell_cross_entropy(logits, target)
    hard_cell_cross_entropy(nn.Parameter(logits.detach()), target, backend="cpp", hard_mode="cell")
    hard_cell_cross_entropy(logits, target, backend="reference")
    assert len(calls) == 2


class Sub(torch.Tensor):
    """A subclass with a say in what is done to it."""


LOGITS, TARGET = inputs()
OTHER = {
    "a subclass": lambda: direct(LOGITS.detach().as_subclass(Sub), TARGET),
    "a lazy sign": lambda: direct(torch._neg_view(LOGITS.detach()), TARGET),
    "zeros without memory": lambda: direct(torch._efficientzerotensor((6, 5)), TARGET),
    "another device": lambda: direct(LOGITS.detach().to("meta"), TARGET.to("meta")),
    "sparse": lambda: direct(LOGITS.detach().to_sparse(), TARGET),
    "no tensor": lambda: direct(LOGITS, [0] * 6),
    "None": lambda: direct(None, TARGET),
    "integers": lambda: direct(TARGET[:, None], TARGET),
    "a float target": lambda: direct(LOGITS, TARGET.float()),
    "a bool target": lambda: direct(LOGITS, TARGET.bool()),
    "a target of another shape": lambda: direct(LOGITS, TARGET[:3]),
    "three dimensions": lambda: direct(LOGITS[None], TARGET[None]),
    "no class": lambda: direct(LOGITS[:, :0], TARGET),
    "too many classes": lambda: direct(torch.zeros(6, 65), TARGET),
    "a weight of another size": lambda: direct(LOGITS, TARGET, torch.ones(4)),
    "a weight with a gradient": lambda: direct(LOGITS, TARGET, torch.ones(5, requires_grad=True)),
    "a weight that is a number": lambda: direct(LOGITS, TARGET, 1.0),
    "a floor above 1": lambda: direct(LOGITS, TARGET, hard_floor=1.1),
    "a floor that is NaN": lambda: direct(LOGITS, TARGET, hard_floor=float("nan")),
    "a mode that there is not": lambda: direct(LOGITS, TARGET, hard_mode="nones"),
    "a mode that is a number": lambda: direct(LOGITS, TARGET, hard_mode=2),
    "a bool to ignore": lambda: direct(LOGITS, TARGET, ignore_index=True),
    "too large a number to ignore": lambda: direct(LOGITS, TARGET, ignore_index=2**64),
}


@pytest.mark.parametrize("call", OTHER)
def test_leaves_the_rest_to_others(call):
    assert OTHER[call]() is None


def test_leaves_tangents_to_others():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(LOGITS.detach(), torch.ones(6, 5))
        assert direct(dual, TARGET) is None
        assert direct(LOGITS, TARGET) is not None


def test_leaves_transforms_to_others():
    seen = []
    torch.func.vmap(lambda x: (seen.append(direct(LOGITS, TARGET)), x)[1])(torch.ones(2))
    torch.func.grad(lambda x: (seen.append(direct(x, TARGET)), x.sum())[1])(LOGITS.detach())
    assert seen == [None, None]


def test_modes_see_the_op():
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode in (Functions, Ops):
        seen.clear()
        with mode():
            hard_cell_cross_entropy(*inputs())
        assert any("qwen_fused" in name for name in seen), mode


def test_a_profile_has_its_name():
    with torch.profiler.profile() as profile:
        hard_cell_cross_entropy(*inputs()).loss.backward()
    assert "qwen_fused::hard_cell_cross_entropy" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("what", ["logits", "target", "weight", "predicted"])
def test_a_write_before_backward_is_noticed(what):
    leaf, target = inputs()
    logits, weight = leaf * 1, torch.ones(5)
    out = hard_cell_cross_entropy(logits, target, class_weight=weight, hard_mode="cell")
    with torch.no_grad():
        {"logits": logits, "target": target, "weight": weight, "predicted": out.predicted}[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_predicted_may_be_written_to_where_backward_has_no_use_for_it():
    logits, target = inputs()
    out = hard_cell_cross_entropy(logits, target, hard_mode="episode")
    out.predicted.zero_()
    out.loss.backward()


def test_what_autograd_asks_of_a_node():
    logits, target = inputs(dtype=torch.float64)
    options = {"hard_mode": "cell", "hard_floor": 0.3}
    (right,) = torch.autograd.grad(hard_cell_cross_entropy(logits, target, backend="reference", **options).loss, logits)
    packed = []
    with graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        loss = hard_cell_cross_entropy(logits, target, **options).loss
    assert len(packed) == 4
    kept = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    batched = torch.autograd.grad(
        loss, logits, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True, retain_graph=True
    )[0]
    again = torch.autograd.grad(loss, logits, create_graph=True)[0]
    for found in (kept, batched[0], batched[1] / -2, again):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="efe_loss has no second derivative.*backend='reference'"):
        again.sum().backward()
    loss = hard_cell_cross_entropy(logits, target, **options).loss
    loss.backward()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    with torch.inference_mode():
        assert direct(logits.clone(), target) is not None


def test_a_target_outside_is_refused_as_by_the_op():
    logits, target = inputs()
    target[2] = 7
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\) or ignore_index -100, got 7 \(1 cells outside\)"):
        hard_cell_cross_entropy(logits, target)
