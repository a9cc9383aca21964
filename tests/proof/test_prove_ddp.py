"""DistributedDataParallel: a parameter that the loss leaves out is named, in place of the wrapper's own error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qwen_fused as qf


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("told", [False, True], ids=["as it is", "find_unused_parameters"])
@pytest.mark.parametrize("named", ["wrapper", "module"])
def test_unused_head_is_named(one_process, told: bool, named: str) -> None:
    torch.manual_seed(0)
    net = TwoHeads()
    wrapper = DistributedDataParallel(net, find_unused_parameters=told)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    report = qf.prove(lambda: F.cross_entropy(wrapper(x), y), wrapper if named == "wrapper" else net, optimizer)
    (finding,) = report.findings
    prefix = "module." if named == "wrapper" else ""
    assert finding.kind == "unused", report
    assert finding.parameters == (f"{prefix}spare.weight", f"{prefix}spare.bias")
    assert report.rungs["correct"].ok and report.rungs["applied"].ok, report
    assert all(p.grad is None for p in net.parameters())


def test_healthy_wrapper_is_proved_and_trains_on(one_process) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    wrapper = DistributedDataParallel(net)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    assert qf.prove(lambda: F.cross_entropy(wrapper(x), y), wrapper, optimizer).ok
    for _ in range(2):
        F.cross_entropy(wrapper(x), y).backward()
    assert all(p.grad.any() for p in net.parameters())
