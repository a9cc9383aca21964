"""Every way to lose a gradient, planted between an encoder and a head, and named apart from the others with line."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_cases import ENCODER, Pair, X, Y, marked, only_finding, proof

from qwen_fused.proof.prove import prove


def by_detach(h):
    return h.detach() * 2  # here


def by_data(h):
    return h.data + 1  # here


def by_item(h):
    print(f"{h.norm():.2f}")
    size = h.abs().mean().item()  # here
    return torch.full((16, 8), size)


def by_tolist(h):
    return torch.tensor(h.tolist())  # here


def by_numpy(h):
    return torch.from_numpy(h.cpu().detach().numpy() * 2)  # here


def by_new_tensor(h):
    return torch.tensor(h)  # here


def by_list_of_scalars(h):
    return torch.tensor([[value for value in row] for row in h])  # here


def by_argmax(h):
    return F.one_hot(h.argmax(1), 8).float()  # here


def by_comparison(h):
    return (h > 0).float()  # here


def by_integer_cast(h):
    return (h * 10).long() / 10  # here


def by_no_grad(h):
    with torch.no_grad():  # here
        h = torch.tanh(h)
    return h + 1


def by_switch(h):
    torch.set_grad_enabled(False)  # here
    h = torch.tanh(h)
    torch.set_grad_enabled(True)
    return h + 1


def by_inference_mode(h):
    with torch.inference_mode():  # here
        h = torch.tanh(h)
    return h.clone()


@torch.no_grad()  # here
def by_decorator(h):
    return torch.tanh(h)


def by_buffer(h):
    kept = torch.zeros(16, 8)
    kept[:] = h.detach()  # here
    return kept


def by_new_parameter(h):
    return nn.Parameter(h.data)  # here


class ReturnsNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2

    @staticmethod
    def backward(ctx, grad):
        return None


def by_custom_none(h):
    return ReturnsNone.apply(h)  # here


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        out = h * 2
        ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad


def by_custom_marked(h):
    return Marked.apply(h)  # here


CUTS = {
    by_detach: "detach",
    by_data: "data",
    by_item: "item",
    by_tolist: "tolist",
    by_numpy: "numpy",
    by_new_tensor: "new tensor",
    by_list_of_scalars: "new tensor",
    by_argmax: "argmax",
    by_comparison: "comparison",
    by_integer_cast: "integer cast",
    by_no_grad: "no_grad",
    by_switch: "no_grad",
    by_inference_mode: "inference_mode",
    by_decorator: "decorated no_grad",
    by_buffer: "detach",
    by_new_parameter: "data",
    by_custom_none: "custom function",
    by_custom_marked: "custom function",
}


@pytest.mark.parametrize("between", CUTS, ids=lambda f: f.__name__)
def test_cut(between):
    report = proof(Pair(between))
    found = only_finding(report, "connected", CUTS[between])
    assert found.parameters == ENCODER
    assert (report.cut.kind, report.cut.parameters) == (CUTS[between], ENCODER)
    assert report.cut.file == __file__ == found.file
    assert report.cut.line == marked(between) == found.line
    # the head beyond the cut is still judged, and holds
    assert report.rungs["nonzero"].ok and report.rungs["correct"].ok


def test_no_grad_names_the_first_operation_too():
    report = proof(Pair(by_no_grad))
    assert report.cut.at.line == marked(by_no_grad) + 1 and report.cut.operation == "torch.no_grad"


def test_gradients_off_around_the_call():
    with torch.no_grad():
        report = proof(Pair())
    assert only_finding(report, "connected", "no_grad").parameters == (*ENCODER, "head.weight", "head.bias")
    assert "switched off" in report.notes[0]


def test_loss_returned_as_a_number():
    model = Pair()

    def loss():
        return F.cross_entropy(model(X), Y).item()  # here

    report = prove(loss, model)
    found = only_finding(report, "connected", "item")
    assert found.line == marked(loss) and len(found.parameters) == 4


def test_unused_and_dropped():
    model = Pair()
    model.spare, model.idle = nn.Linear(8, 3), nn.Linear(2, 2)

    def loss():
        hidden = model.encoder(X)
        model.spare(hidden)
        return F.cross_entropy(model.head(hidden), Y)

    rung = prove(loss, model).rungs["connected"]
    assert [(f.kind, f.parameters) for f in rung.findings] == [
        ("unused", ("idle.weight", "idle.bias")),
        ("dropped", ("spare.weight", "spare.bias")),
    ]
