"""Tasks side by side come out as they do one by one, and none touches another."""

from __future__ import annotations

import pytest
import torch

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver.adapt import adapt
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.stacked import StackedPlanner, adapt_many

TINY = {"agent_channels": 8, "prompt_dim": 16, "plan_steps": 2, "policy_hidden": 8}


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def planner(double) -> QwenPlanner:
    torch.manual_seed(0)
    return QwenPlanner(TrainConfig(**TINY)).double()


def small_tasks(count: int) -> list:
    """Tasks with grids of different sizes, some without a size rule."""
    fits = [t for t in load_tasks("arc1").tasks if max(max(p.input.shape + p.output.shape) for p in t.train) <= 9]
    return fits[:count]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_side_by_side_equals_one_by_one(planner, average):
    settings = SolveSettings(steps=5, batch=3, average=average)
    tasks = small_tasks(10)
    together = adapt_many(planner, tasks, settings)
    for task, found in zip(tasks, together, strict=True):
        alone = adapt(planner, task, settings)
        assert found.steps == alone.steps == 5
        torch.testing.assert_close(found.losses, alone.losses, rtol=1e-9, atol=1e-9)
        for (name, a), (_, b) in zip(found.planner.named_parameters(), alone.planner.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert found.own_accuracy == alone.own_accuracy


def test_the_clip_is_each_tasks_own(planner):
    # with a bound far below any gradient, every task's gradient has that norm, and none is scaled by another's
    tasks = small_tasks(2)
    settings = SolveSettings(steps=1, batch=2, clip=1e-3)
    seen = []
    models = [found.planner for found in adapt_many(planner, tasks, SolveSettings(steps=0))]
    stacked = StackedPlanner(models)
    groups = stacked.task_parameters()
    assert [len(group) for group in groups.values()] == [len(list(models[0].parameters()))] * 2
    for stack in stacked.stacks:
        stack.grad += torch.arange(1.0, 3.0).view(2, *[1] * (stack.dim() - 1))  # type: ignore[operator]
    for number, group in enumerate(groups.values()):
        assert all(torch.equal(p.grad, torch.full_like(p, number + 1.0)) for _, p in group)
    adapt_many(planner, tasks, settings, on_step=lambda step, loss: seen.append((step, loss.shape)))
    assert seen == [(1, torch.Size([2]))]


def test_the_planner_stays_as_it_is(planner):
    before = {name: p.clone() for name, p in planner.state_dict().items()}
    adapt_many(planner, small_tasks(2), SolveSettings(steps=2, batch=2))
    after = planner.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
