"""The proof as a tool: what it reports, what it leaves as it was, what `allow` does, and what it can't judge."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rich.console import Console

from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.prove import prove

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


class Net(nn.Module):
    """Everything a proof could disturb: dropout, batch statistics, a counter, a list, an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("average", torch.zeros(8))
        self.seen, self.calls = [], 0

    def forward(self, x):
        hidden = self.dropout(self.norm(self.encoder(x)).relu())
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        self.seen.append(len(x))
        self.calls += 1
        return self.head(hidden)


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def loss_of(model):
    return lambda: F.cross_entropy(model(X), Y)


def state_of(model, optimizer):
    """A deep copy of all that must not change."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "flags": [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()],
            "attributes": (model.seen, model.calls),
            "random": (random.getstate(), torch.get_rng_state()),
            "numpy": np.random.get_state()[1],
        }
    )


def assert_same(one, other):
    leaves = torch.utils._pytree.tree_leaves
    assert len(leaves(one)) == len(leaves(other))
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert (
            np.array_equal(a, b) if isinstance(a, np.ndarray) else torch.equal(a, b) if torch.is_tensor(a) else a == b
        )


@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_as_before(broken):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model)().backward()
    optimizer.step()
    model.encoder.bias.requires_grad_(False)
    before = state_of(model, optimizer)
    identities = [id(p) for p in model.parameters()] + [id(p.grad) for p in model.parameters()] + [id(model.average)]
    loss = loss_of(model) if not broken else lambda: F.cross_entropy(model(X).detach() + model.head.bias, Y)
    prove(loss, model, optimizer)
    assert_same(before, state_of(model, optimizer))
    assert identities == [id(p) for p in model.parameters()] + [id(p.grad) for p in model.parameters()] + [
        id(model.average)
    ]


def test_everything_is_as_before_after_an_error():
    model = Net()
    optimizer = adamw(model)
    before = state_of(model, optimizer)
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("batch")
        return loss_of(model)()

    with pytest.raises(KeyError, match="batch"):
        prove(loss, model, optimizer)
    assert_same(before, state_of(model, optimizer))


def test_a_training_run_is_the_same_with_and_without_proofs():
    def run(proving):
        model = Net()
        optimizer = adamw(model)
        for _ in range(3):
            if proving:
                prove(loss_of(model), model, optimizer)
            optimizer.zero_grad()
            loss = loss_of(model)()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert run(proving=True) == run(proving=False)


def test_report_of_a_proved_loop():
    model = Net()
    report = prove(loss_of(model), model, adamw(model))
    assert (
        report.ok
        and report.verdict == "proved"
        and list(report.rungs)
        == [
            "declared",
            "connected",
            "nonzero",
            "correct",
            "applied",
        ]
    )
    assert report.parameters == 6 and report.evaluations <= 13 and report.seconds > 0
    assert [row["layer"] for row in report.layers] == ["encoder", "norm", "head"]
    model.zero_grad()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    report = prove(loss_of(model), model)
    torch.set_rng_state(state)
    loss_of(model)().backward()
    norm = torch.cat([p.grad.flatten() for p in model.head.parameters()]).norm().item()
    assert report.layers[2]["norm"] == pytest.approx(norm, rel=1e-5)


def test_report_as_text_and_as_json():
    model = Net()
    model.between = nn.Identity()
    cut = lambda: F.cross_entropy(model.head(model.encoder(X).detach()), Y)  # noqa: E731
    report = prove(cut, model, adamw(model), allow=("norm.*", "nobody"))
    text = str(report)
    assert text.startswith("gradient broken") and "2 connected BROKEN" in text and "test_prove.py:" in text
    assert "model.encoder(X).detach()" in text and "allow entry 'nobody' matched nothing" in text
    console = Console(width=300, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(report)
    assert console.export_text().split() == text.split()
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False and plain["verdict"] == "broken" and plain["allowed"] == {"norm.*": 2, "nobody": 0}
    assert plain["cut"]["line"] == report.cut.line and plain["cut"]["source"].startswith("cut = lambda")
    assert plain["rungs"]["connected"]["parameters"] == ["encoder.weight", "encoder.bias"]
    assert plain["rungs"]["connected"]["findings"][0]["kind"] == "detach"


def test_without_an_optimizer_the_step_is_not_asked_for():
    model = Net()
    report = prove(loss_of(model), model)
    assert report.rungs["applied"].ok is None and not report.rungs["applied"].asked
    assert report.ok and "groups not judged" in report.rungs["declared"].detail


def test_params_by_name():
    model = Net()
    some = {"head": model.head, "w": model.encoder.weight}
    report = prove(loss_of(model), some, adamw(model))
    assert report.ok and report.parameters == 3
    tied = {"one": model.head.weight, "two": model.head.weight}
    assert prove(loss_of(model), tied).parameters == 1


def test_several_optimizers():
    model = Net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.encoder, model.norm, model.head)]
    assert prove(loss_of(model), model, optimizers).ok


def test_optimizer_with_momentum_from_before():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        loss_of(model)().backward()
        optimizer.step()
    assert prove(loss_of(model), model, optimizer).ok


def test_own_generators_are_rewound():
    model = Net()
    model.noise = torch.Generator().manual_seed(3)
    rng, closed = np.random.default_rng(4), torch.Generator().manual_seed(5)

    def loss():
        x = X + torch.randn(X.shape, generator=model.noise) + torch.randn(X.shape, generator=closed)
        return F.cross_entropy(model(x * float(rng.uniform(0.5, 1.5))), Y)

    state = model.noise.get_state(), closed.get_state(), rng.bit_generator.state
    assert prove(loss, model, adamw(model)).ok
    assert torch.equal(state[0], model.noise.get_state()) and torch.equal(state[1], closed.get_state())
    assert state[2] == rng.bit_generator.state


def test_loss_that_is_not_repeatable_is_not_judged():
    model, calls = Net(), []

    def loss():
        calls.append(1)
        return F.cross_entropy(model(X) * (1 + 0.1 * len(calls)), Y)

    report = prove(loss, model, adamw(model))
    assert report.rungs["correct"].ok is None and "not repeatable" in report.rungs["correct"].detail
    assert report.verdict == "not proved" and not report.ok


def test_learning_rate_that_a_scheduler_holds_at_zero_is_judged_at_the_rate_to_come():
    model = Net()
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    report = prove(loss_of(model), model, optimizer)
    assert report.ok and "100% of their elements" in report.rungs["applied"].detail
    assert any("warm-up holds the learning rate" in note for note in report.notes)
    assert optimizer.param_groups[0]["lr"] == 0


def test_step_too_long_for_first_order_still_holds_for_a_part():
    model = Net()
    report = prove(loss_of(model), model, torch.optim.SGD(model.parameters(), lr=30.0))
    assert report.ok and "of the step" in report.rungs["applied"].detail


def test_kink_at_the_very_point():
    # zero weights from zero inputs: |w| has no derivative there, and autograd's 0 is one of its slopes
    w, v = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.ones(5))
    report = prove(lambda: w.abs().sum() + w.sum() * 0.3 + v.square().sum(), {"w": w, "v": v})
    assert report.ok


def test_directions_tell_noise_from_a_wrong_gradient():
    p = nn.Parameter(torch.ones(50))
    right = {"p": torch.full((50,), 2.0)}
    noise = np.random.default_rng(0)
    rough = lambda _: float(p.detach().square().sum()) + noise.normal() * 50  # noqa: E731
    smooth = lambda _: float(p.detach().double().square().sum())  # noqa: E731
    assert Directions({"p": p}, right, smooth, torch.float32, None, 0).check(0).ok is True
    wrong = {"p": torch.full((50,), 2.1)}
    assert Directions({"p": p}, wrong, smooth, torch.float32, None, 0).check(0).ok is False
    assert Directions({"p": p}, right, rough, torch.float32, None, 0).check(0).ok is None
    assert torch.equal(p, torch.ones(50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": torch.ones(1)}, "loss_fn must be callable without arguments, got Tensor"),
        ({"loss_fn": lambda: torch.ones(2)}, r"loss_fn must return a scalar, got a tensor of shape \(2,\)"),
        ({"loss_fn": lambda: "loss"}, "loss_fn must return a scalar loss, got str"),
        ({"loss_fn": lambda: torch.tensor(1)}, "loss_fn must return a floating-point scalar, got torch.int64"),
        ({"params": [1]}, "params must be a module or a mapping of names, got list"),
        ({"params": {"p": 1}}, r"params\['p'\] must be a parameter or a module, got int"),
        ({"optimizer": [1]}, "optimizer must be a torch optimizer or several, got int"),
        ({"allow": (1,)}, "allow must hold strings, got int"),
        ({"directions": 0}, "directions must be a whole number of at least 1, got 0"),
    ],
)
def test_rejects_bad_input(arguments, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        prove(**({"loss_fn": loss_of(model), "params": model} | arguments))
