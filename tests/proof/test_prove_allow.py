"""What is intended: allowed cuts, names and operations, leaves that the caller's backward carries on; what is noted."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from qwen_fused.proof.prove import prove

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


class Net(nn.Module):
    """An encoder, a normalisation and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.encoder(x)).relu())


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_of(model):
    return lambda: F.cross_entropy(model(X), Y)


def hard_mask(logits):
    return 0.5 + 0.5 * (logits.argmax(1) != Y).float()


@pytest.mark.parametrize(
    "entry",
    ["hard_mask", "test_prove_allow.py:hard_mask", "argmax", "Tensor.argmax", "test_prove_allow.py:*mask", "hard_*"],
)
def test_allowed_cut_is_no_note(entry):
    model = Net()

    def loss():
        logits = model(X)
        return (hard_mask(logits) * F.cross_entropy(logits, Y, reduction="none")).mean()

    told = prove(loss, model)
    assert told.ok and len(told.notes) == 1 and "Tensor.argmax" in told.notes[0]
    quiet = prove(loss, model, allow=(entry,))
    assert quiet.ok and quiet.notes == [] and quiet.allowed[entry] >= 1


def test_allowed_cut_never_excuses_a_parameter_without_gradient():
    model = Net()
    only_masked = lambda: (hard_mask(model(X)) * model.head.bias.sum()).mean()  # noqa: E731
    report = prove(only_masked, model, allow=("hard_mask",))
    assert report.verdict == "broken" and report.cut.kind == "argmax"
    assert "encoder.weight" in report.cut.parameters


def test_allowed_modules_and_parameters():
    model = Net()
    model.encoder.eval()
    model.head.bias.requires_grad_(False)
    assert prove(loss_of(model), model).rungs["declared"].parameters == ("head.bias", "encoder.weight", "encoder.bias")
    assert prove(loss_of(model), model, allow=("encoder", "head.bias")).ok


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return torch.round(4 * h) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class RoundedTwice(Rounded):
    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_straight_through_by_name():
    model = Net()
    loss = lambda: F.cross_entropy(model.head(Rounded.apply(model.encoder(X))), Y)  # noqa: E731
    honest = prove(loss, model, allow=("norm.*",))
    assert [f.kind for f in honest.rungs["correct"].findings] == ["wrong"]
    assert prove(loss, model, allow=("norm.*", "Rounded")).ok
    # taking one operation at its word leaves the others to be checked
    other = lambda: F.cross_entropy(model.head(RoundedTwice.apply(Rounded.apply(model.encoder(X)))), Y)  # noqa: E731
    report = prove(other, model, allow=("norm.*", "Rounded"))
    assert [f.detail.split()[3] for f in report.rungs["correct"].findings] == ["RoundedTwice"]


def test_value_that_comes_back_as_a_number_is_noted():
    model = Net()

    def loss():
        value = F.cross_entropy(model(X), Y)
        shown, scale = value.item(), value.item()
        return value * scale if shown else value

    report = prove(loss, model)
    assert report.ok and [note.split(":")[0] for note in report.notes] == [
        "a value that left tensors comes back into the loss"
    ]


class MiniWindow:
    """Computes a prompt once, hands out a leaf, sends the leaf's gradient through at the end."""

    def __init__(self, encoder):
        self.encoder = encoder

    def prompts(self, x):
        self.x = x
        self.leaf = self.encoder(x).detach().requires_grad_()
        return self.leaf

    def flush(self):
        self.encoder(self.x).backward(self.leaf.grad)


def test_leaf_that_the_callers_backward_carries_on_from():
    model = Net()
    window = MiniWindow(model.encoder)
    loss = lambda: F.cross_entropy(model.head(window.prompts(X)), Y)  # noqa: E731
    without = prove(loss, model, allow=("norm.*",))
    assert without.cut.kind == "detach" and without.cut.function.endswith("MiniWindow.prompts")

    def backward(value):
        value.backward()
        window.flush()

    report = prove(loss, model, adamw(model), allow=("norm.*",), backward=backward)
    assert report.ok and "carried past Tensor.detach" in report.notes[0]

    def twice(value):
        backward(value)
        window.flush()

    report = prove(loss, model, allow=("norm.*",), backward=twice)
    assert report.rungs["correct"].ok is False and set(report.rungs["correct"].parameters) == {
        "encoder.weight",
        "encoder.bias",
    }


def test_loss_scaled_down_before_backward_is_noted():
    # as a loop does that accumulates over four batches
    model = Net()
    report = prove(loss_of(model), model, adamw(model), backward=lambda loss: (loss / 4).backward())
    assert report.ok and report.notes == ["the loss is scaled by 0.25 for backward"]


def test_gradient_scaled_on_the_loss_itself():
    model = Net()

    def loss():
        value = loss_of(model)()
        value.register_hook(lambda grad: grad / 4)
        return value

    (finding,) = prove(loss, model).rungs["correct"].findings
    assert finding.kind == "wrong" and len(finding.parameters) == 6
