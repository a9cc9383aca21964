"""What the tests of planted faults share: a small model with a gap to put the fault in, and how to look at a proof."""

from __future__ import annotations

import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F

from qwen_fused.proof.prove import prove


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
