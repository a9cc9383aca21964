"""Faults below the step: declared wrongly, zero, not finite, wrong. Each breaks its own rung, with names and line."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_cases import ENCODER, Pair, X, Y, marked, only_finding, proof

from qwen_fused.proof.prove import prove


def test_healthy():
    report = proof(Pair())
    assert report.ok and report.cut is None and report.findings == [] and report.notes == []


def test_frozen():
    model = Pair()
    model.encoder.weight.requires_grad_(False)
    assert only_finding(proof(model), "declared", "frozen").parameters == ("encoder.weight",)


def test_not_in_the_optimizer():
    model = Pair()
    report = proof(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    assert only_finding(report, "declared", "not in the optimizer").parameters == ENCODER
    # what no optimizer holds is not blamed a second time
    assert report.rungs["applied"].ok


def in_a_dict_of_lists():
    return {"layers": [nn.Linear(8, 8)]}, "kept.layers.0.weight", lambda kept, h: kept["layers"][0](h)


def in_a_tuple():
    return (nn.Linear(8, 8),), "kept.0.weight", lambda kept, h: kept[0](h)


def converted():
    return nn.Parameter(torch.eye(8, dtype=torch.float64)).to(torch.float32), "kept", lambda kept, h: h @ kept


@pytest.mark.parametrize("make", [in_a_dict_of_lists, in_a_tuple, converted])
def test_what_a_module_keeps_outside_its_registries_is_named(make):
    kept, name, use = make()
    model = Pair(lambda h: use(kept, h))
    model.kept = kept
    # without an optimizer too
    report = prove(lambda: F.cross_entropy(model(X), Y), model)
    assert only_finding(report, "declared", "unregistered").parameters[0] == name


@pytest.mark.parametrize("two", ["groups", "optimizers"])
def test_in_two_groups(two):
    model = Pair()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    if two == "groups":
        again = dict(optimizers[0].param_groups[0], params=list(model.encoder.parameters()))
        optimizers[0].param_groups.append(again)
    else:
        optimizers.append(torch.optim.SGD(model.encoder.parameters(), lr=0.1))
    assert only_finding(proof(model, optimizers), "declared", "in two groups").parameters == ENCODER


def test_eval_mode():
    model = Pair()
    model.encoder.eval()
    report = proof(model)
    found = only_finding(report, "declared", "eval mode")
    assert found.parameters == ENCODER and "encoder" in found.detail
    assert not model.encoder.training and model.head.training


class Adapter(nn.Module):
    """A low-rank path beside the identity."""

    def __init__(self, both_zero):
        super().__init__()
        self.down = nn.Parameter(torch.zeros(8, 2) if both_zero else torch.randn(8, 2))
        self.up = nn.Parameter(torch.zeros(2, 8))

    def forward(self, h):
        return h + h @ self.down @ self.up  # here


def test_zero_on_both_sides():
    report = proof(Pair(Adapter(both_zero=True)))
    rung = report.rungs["nonzero"]
    assert rung.ok is False and rung.parameters == ("between.down", "between.up")
    assert {(f.kind, f.line) for f in rung.findings} == {("zero", marked(Adapter.forward))}


def test_zero_on_one_side_wakes_up():
    report = proof(Pair(Adapter(both_zero=False)))
    assert report.ok and "between.down" in report.rungs["nonzero"].detail


def test_rounding_is_connected_but_zero():
    def between(h):
        return torch.round(h)  # here

    found = only_finding(proof(Pair(between)), "nonzero", "zero")
    assert found.parameters == ENCODER and found.line == marked(between)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.sin()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class RightSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_wrong_backward():
    def between(h):
        h = RightSine.apply(h)
        return Doubled.apply(h)  # here

    report = proof(Pair(between))
    found = only_finding(report, "correct", "wrong")
    assert found.parameters == ENCODER and found.line == marked(between) and "Doubled" in found.detail
    assert report.rungs["connected"].ok and report.rungs["nonzero"].ok


def test_right_custom_backward_passes():
    assert proof(Pair(lambda h: RightSine.apply(h))).ok


def test_wrong_by_a_hook():
    def between(h):
        h.register_hook(lambda grad: 3 * grad)  # here
        return h

    found = only_finding(proof(Pair(between)), "correct", "wrong")
    assert found.line == marked(between) and set(ENCODER) <= set(found.parameters)


def test_gradient_put_in_place_of_one_that_is_zero():
    # rounded, the loss does not move at all: no multiple of its derivative is the gradient
    model = Pair()

    def backward(loss):
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    report = prove(lambda: model(X).round().mean(), model, backward=backward)
    assert only_finding(report, "correct", "wrong").parameters


def test_parameter_hook_is_told_with_its_line():
    model = Pair()
    halve = lambda grad: grad / 2  # noqa: E731
    model.head.weight.register_hook(halve)
    report = proof(model)
    assert report.ok and report.rungs["correct"].ok, report
    (note,) = [note for note in report.notes if "a hook" in note]
    assert "on head.weight changes its gradient" in note and f":{halve.__code__.co_firstlineno} in" in note


def test_nonfinite_gradient():
    def between(h):
        return (h - h.mean(1, keepdim=True)).square().sum(1, keepdim=True).mul(0).sqrt() + h  # here

    found = only_finding(proof(Pair(between)), "nonzero", "non-finite")
    assert set(found.parameters) == set(ENCODER) and found.line == marked(between) and "Sqrt" in found.detail


def test_nonfinite_loss():
    def between(h):
        h = torch.log(h - 1e3)  # here
        return h * 2

    report = proof(Pair(between))
    found = only_finding(report, "nonzero", "non-finite")
    assert found.line == marked(between) and "log" in found.detail and math.isnan(report.loss)
    assert report.rungs["correct"].ok is None


def test_value_overwritten_behind_autograd():
    def between(h):
        h = torch.sigmoid(h)
        h.data.mul_(0.5)  # here
        return h

    found = only_finding(proof(Pair(between)), "correct", "wrong")
    assert found.line == marked(between)
