"""Faults planted one by one: each must break its own rung, name its parameters and, where there is one, its line."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from qwen_fused.prove import prove


class Pair(nn.Module):
    """An encoder whose output passes through `between` on its way to a head."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.between = between or (lambda h: h)

    def forward(self, x):
        return self.head(self.between(self.encoder(x)))


X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
ENCODER = ("encoder.weight", "encoder.bias")


def proof(model, optimizer=None, **more):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    return prove(lambda: F.cross_entropy(model(X), Y), model, optimizer, **more)


def marked(function, mark="# here"):
    """Line number of the one line of a function that carries the mark."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    (place,) = [i for i, line in enumerate(lines) if mark in line]
    return first + place


def only_finding(report, rung, kind):
    """The single finding of a rung, after checking that the rung is broken, by this kind, and says so."""
    assert report.rungs[rung].ok is False, report
    assert [f.kind for f in report.rungs[rung].findings] == [kind], report
    assert not report.ok and report.verdict == "broken" and kind in str(report)
    return report.rungs[rung].findings[0]


def test_healthy():
    report = proof(Pair())
    assert report.ok and report.cut is None and report.findings == [] and report.notes == []


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


def test_wrong_by_a_parameter_hook():
    model = Pair()
    halve = lambda grad: grad / 2  # noqa: E731  # here
    model.head.weight.register_hook(halve)
    found = only_finding(proof(model), "correct", "wrong")
    assert "head.weight" in found.detail and found.line == halve.__code__.co_firstlineno


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


def test_erased_between_backward_and_step():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()  # here
        optimizer.step()

    report = proof(model, optimizer, step=step)
    found = only_finding(report, "applied", "erased")
    assert found.line == marked(step) and len(found.parameters) == 4


@pytest.mark.parametrize("to_none", [True, False])
def test_erased_within_backward(to_none):
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(loss):
        loss.backward()
        optimizer.zero_grad(set_to_none=to_none)  # here

    report = proof(model, optimizer, backward=backward)
    found = only_finding(report, "applied", "erased")
    assert found.line == marked(backward) and len(found.parameters) == 4
    assert report.rungs["connected"].ok


def test_layer_made_anew_at_each_forward():
    def between(h):
        return nn.Linear(8, 8, bias=False)(h)  # here

    found = only_finding(proof(Pair(between)), "applied", "fresh")
    assert found.line == marked(between) and found.parameters == ("<new 8x8>",)


class Replacing(Pair):
    def forward(self, x):
        self.head = nn.Linear(8, 3)  # here
        return super().forward(x)


def test_named_layer_replaced_at_each_forward():
    model = Replacing()
    head = model.head
    report = proof(model)
    found = only_finding(report, "connected", "replaced")
    assert set(found.parameters) == {"head.weight", "head.bias"} and found.line == marked(Replacing.forward)
    assert [(f.kind, f.line) for f in report.rungs["applied"].findings] == [("fresh", found.line)]
    assert model.head is head


class Lazy(Pair):
    def forward(self, x):
        if not hasattr(self, "preference"):
            self.preference = nn.Parameter(torch.randn(3))  # here
        return super().forward(x) + self.preference


def test_parameter_made_late():
    found = only_finding(proof(Lazy()), "applied", "created late")
    assert found.parameters == ("preference",) and abs(found.line - marked(Lazy.forward)) <= 1


def test_learning_rate_zero():
    model = Pair()
    groups = [{"params": model.encoder.parameters(), "lr": 0.0}, {"params": model.head.parameters(), "lr": 1e-3}]
    found = only_finding(proof(model, torch.optim.AdamW(groups)), "applied", "learning rate 0")
    assert found.parameters == ENCODER


def test_step_that_never_steps():
    found = only_finding(proof(Pair(), step=lambda: None), "applied", "no step")
    assert len(found.parameters) == 4


def test_step_rounded_away_in_bfloat16():
    model = Pair().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    report = prove(lambda: F.cross_entropy(model(X.bfloat16()).float(), Y), model, optimizer)
    assert only_finding(report, "applied", "rounded away").parameters == (*ENCODER, "head.weight", "head.bias")


def test_step_uphill():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    only_finding(proof(model, optimizer), "applied", "uphill")


class Cached(Pair):
    """Keeps the encoder's output of the first call."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.kept = keep, None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.keep(self.encoder(x))
        return self.head(self.kept)  # here


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_stale_cache_with_its_graph(warm):
    model = Cached(lambda h: h)
    if warm:
        F.cross_entropy(model(X), Y).backward()
    report = proof(model)
    found = only_finding(report, "applied", "stale cache")
    assert found.parameters == ENCODER and found.line == marked(Cached.forward)
    assert (model.kept is not None) == warm


def test_stale_cache_without_its_graph():
    kinds = [f.kind for f in proof(Cached(lambda h: h.detach())).findings]
    assert kinds[-1] == "stale cache"


def test_value_overwritten_behind_autograd():
    def between(h):
        h = torch.sigmoid(h)
        h.data.mul_(0.5)  # here
        return h

    found = only_finding(proof(Pair(between)), "correct", "wrong")
    assert found.line == marked(between)


def test_gradient_of_another_loss():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        optimizer.step()

    found = only_finding(proof(model, optimizer, step=step), "applied", "changed")
    assert len(found.parameters) == 4
