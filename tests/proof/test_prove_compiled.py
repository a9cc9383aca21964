"""Compiled functions and modules are proved by their source, and their gradients held against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qwen_fused as qf

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.dropout = nn.Linear(8, 8), nn.Linear(8, 3), nn.Dropout(dropout)

    def forward(self, x):  # here
        return self.head(self.dropout(torch.tanh(self.body(x))))


def prove(net: nn.Module, loss) -> qf.ProofReport:
    return qf.prove(loss, net, torch.optim.AdamW(net.parameters(), 1e-3))


def halved(module: torch.fx.GraphModule, inputs):
    """A backend whose tanh passes on half the gradient."""
    for node in module.graph.nodes:
        if node.target is torch.tanh:
            node.target = lambda x: 0.5 * torch.tanh(x) + 0.5 * torch.tanh(x).detach()
    module.recompile()
    return module


def doubled(module: torch.fx.GraphModule, inputs):
    """A backend whose tanh is another function."""
    for node in module.graph.nodes:
        if node.target is torch.tanh:
            node.target = lambda x: 2 * torch.tanh(x)
    module.recompile()
    return module


def raising(module: torch.fx.GraphModule, inputs):
    """A backend that compiles what can't run."""

    def run(*args):
        raise RuntimeError("no kernel for this shape")

    return run


class Counting:
    """A backend that runs the source, and counts what it is given to compile."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, module: torch.fx.GraphModule, inputs):
        self.compiled += 1
        return module


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_module_is_compiled_once_and_gives_the_same(dropout) -> None:
    net, backend = Net(dropout), Counting()
    compiled = torch.compile(net, backend=backend)
    report = prove(net, lambda: F.cross_entropy(compiled(X), Y))
    assert report.headline == "proved" and "compiled code gives the same" in report.rungs["correct"].detail, report
    assert backend.compiled == 1


def test_whole_loss_and_the_given_backward() -> None:
    net, backend = Net(), Counting()
    loss = torch.compile(lambda: F.cross_entropy(net(X), Y), backend=backend)
    part = torch.compile(lambda x, y: F.cross_entropy(net(x), y) / 2, backend=backend)

    def backward(_):
        for rows in (slice(0, 8), slice(8, 16)):
            part(X[rows], Y[rows]).backward()

    report = qf.prove(loss, net, torch.optim.AdamW(net.parameters(), 1e-3), backward=backward)
    assert report.ok and "compiled code gives the same" in report.rungs["correct"].detail, report
    assert backend.compiled == 2


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (halved, "gives another gradient of body.weight, body.bias than its source"),
        (doubled, "gives a loss of"),
        (raising, "runs as source, and raises once it is compiled: no kernel for this shape"),
    ],
)
def test_difference_is_named(backend, says) -> None:
    net = Net()
    compiled = torch.compile(net, backend=backend)
    report = prove(net, lambda: F.cross_entropy(compiled(X), Y))
    (found,) = report.findings
    assert report.rungs["correct"].ok is False and found.kind == "compiled", report
    assert f"Net, compiled, {says}" in found.detail and found.line == Net.forward.__code__.co_firstlineno


def test_fault_in_the_source_is_named_once() -> None:
    net = Net()
    compiled = torch.compile(lambda x: net.head(torch.tanh(net.body(x)).detach()), backend="eager")
    report = prove(net, lambda: F.cross_entropy(compiled(X), Y))
    (found,) = report.findings
    assert report.rungs["connected"].ok is False and found.kind == "detach", report


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inductor(dropout) -> None:
    net = Net(dropout)
    compiled = torch.compile(net, backend="inductor")
    report = prove(net, lambda: F.cross_entropy(compiled(X), Y))
    assert report.verdict == "proved", report
    same = "compiled code gives the same" in report.rungs["correct"].detail
    assert same or any("draws other random numbers" in note for note in report.notes), report
