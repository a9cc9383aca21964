"""Faults of the step and of what outlives a call: erased, not moved, made anew, kept. Each breaks the last rung."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_cases import ENCODER, Pair, X, Y, marked, only_finding, proof

from qwen_fused.proof.prove import prove


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


def test_one_group_of_two_that_warms_up():
    model = Pair()
    optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in (model.encoder, model.head)], lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: min(1.0, step / 10), lambda step: 1.0])
    report = proof(model, optimizer)
    assert report.ok and any("warm-up holds the learning rate of encoder.weight" in note for note in report.notes)


def test_step_of_an_optimizer_without_a_rate_that_moves_nothing():
    class Idle:
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self):
            pass

    model = Pair()
    assert len(only_finding(proof(model, Idle(model.parameters())), "applied", "not moved").parameters) == 4


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


def test_optimizers_that_step_in_backward_begin_each_call_as_they_were():
    model, seen = Pair(), []
    optimizers = {p: torch.optim.Adam([p]) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)

    def loss():
        seen.append(sum(len(optimizer.state) for optimizer in optimizers.values()))
        return F.cross_entropy(model(X), Y)

    report = prove(loss, model, list(optimizers.values()), step=lambda: None)
    assert report.ok and "while backward was going on" in report.rungs["applied"].detail, report
    assert set(seen) == {0}


def test_gradient_erased_inside_a_wrapper_of_the_optimizer():
    class Wrapper:
        def __init__(self, inside):
            self.inside, self.param_groups = inside, inside.param_groups

        def step(self):
            self.inside.zero_grad()  # here
            self.inside.step()

    model = Pair()
    report = proof(model, Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert only_finding(report, "applied", "erased").line == marked(Wrapper.step)


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h.tanh())
        return h.tanh()

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return grad * (1 - out**2)


@pytest.mark.parametrize("allow", [[], ["Tanh"]])
def test_first_order_is_judged_with_an_operation_taken_at_its_word(allow):
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], int(Y.max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report = prove(lambda: F.cross_entropy(Tanh.apply(model(X)), Y), model, optimizer, allow=allow)
    assert report.ok, str(report)
    assert "first order says" in report.rungs["applied"].detail


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
    report = proof(Cached(lambda h: h.detach()))
    found = only_finding(report, "applied", "stale cache")
    assert found.parameters == ENCODER and found.line == marked(Cached.forward)
    assert report.cut.kind == "detach"


def test_gradient_of_another_loss():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        optimizer.step()

    found = only_finding(proof(model, optimizer, step=step), "applied", "changed")
    assert len(found.parameters) == 4


@pytest.mark.parametrize("unscales", [True, False])
def test_loss_scaled_for_backward(unscales):
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step():
        if unscales:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    report = proof(model, optimizer, backward=lambda loss: scaler.scale(loss).backward(), step=step)
    assert report.rungs["correct"].ok
    # nothing here is computed in 16 bits: the autocast that the scaler is for never ran
    assert any("is autocast on" in note for note in report.notes)
    if unscales:
        assert report.ok
    else:
        found = only_finding(report, "applied", "still scaled")
        assert "1024" in found.detail and len(found.parameters) == 4
