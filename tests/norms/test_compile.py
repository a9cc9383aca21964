"""`measure` and `clip_` inside torch.compile: one graph, eager's bits, and two compilations for any schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qwen_fused.norms.group_grad_norm import GroupGradNorm

STEPS = 12
NUMBERS = [0.1 + step / 50 for step in range(STEPS)]
SCHEDULES = {
    "constant": [(0.1,)] * STEPS,
    "bound": [(x,) for x in NUMBERS],
    "bound per group": [({"w": x, "b": 1.0},) for x in NUMBERS],
    "a group left out": [({"w": x},) for x in NUMBERS],
    "tensor": [(torch.tensor(x),) for x in NUMBERS],
    "tensor of groups": [(torch.tensor([x, 0.3]),) for x in NUMBERS],
    "number and tensor": [({"w": torch.tensor(x), "b": 2 * x},) for x in NUMBERS],
    "scale": [(1.0, x) for x in NUMBERS],
    "scale as a tensor": [(1.0, torch.tensor(x)) for x in NUMBERS],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_compiles_whole_and_at_most_twice(gradient_path: str, name: str) -> None:
    layer = nn.Linear(5, 5)
    norms = GroupGradNorm({"w": [layer.weight], "b": [layer.bias]})
    gradients = [torch.randn_like(p) for p in layer.parameters()]

    def step(bound, inv_scale=None) -> Tensor:
        stats = norms.measure(inv_scale)
        norms.clip_(stats, bound)
        return stats.norm

    def run(call, arguments) -> list[Tensor]:
        for p, gradient in zip(layer.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        return [call(*arguments).clone(), *(p.grad for p in layer.parameters())]

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for arguments in SCHEDULES[name]:
        got = run(compiled, arguments)
        assert all(map(torch.equal, got, run(step, arguments)))
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_compiled_clip_is_a_write() -> None:
    layer = nn.Linear(3, 3)
    norms = GroupGradNorm({"layer": layer})
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    versions = [p.grad._version for p in layer.parameters()]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step() -> None:
        norms.clip_(norms.measure(), 0.1)

    step()
    assert all(p.grad._version > v for p, v in zip(layer.parameters(), versions, strict=True))


def test_stats_that_leave_the_graph_are_spent_there() -> None:
    layer = nn.Linear(3, 3)
    norms = GroupGradNorm({"layer": layer})
    for p in layer.parameters():
        p.grad = torch.ones_like(p)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step():
        stats = norms.measure()
        norms.clip_(stats, 0.1)
        return stats

    stats = step()
    with pytest.raises(RuntimeError, match="stats must be measured anew"):
        norms.clip_(stats, 0.1)
