"""Tasks side by side come out as they do one by one, and none touches another."""

from __future__ import annotations

import pytest
import torch

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver.adapt import adapt, own_accuracy
from qwen_fused.solver.adapt_many import AdaptedMany, TrainingStep, adapt_many
from qwen_fused.solver.examples import task_rng
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.stacked import StackedPlanner, stack_prompts
from qwen_fused.solver.task_planner import encode_task
from qwen_fused.solver.vote import vote
from qwen_fused.solver.vote_many import own_accuracies, vote_many

TINY = {"agent_channels": 8, "prompt_dim": 16, "plan_steps": 2, "policy_hidden": 8}
CPU = torch.device("cpu")


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


def encodings(planner: QwenPlanner, tasks: list, settings: SolveSettings) -> list:
    return [encode_task(planner, task, settings.symmetries) for task in tasks]


def side_by_side(planner: QwenPlanner, tasks: list, settings: SolveSettings, **options) -> AdaptedMany:
    return adapt_many(planner.agent, encodings(planner, tasks, settings), tasks, settings, **options)


@pytest.mark.parametrize("options", [{}, {"average": 0.9}, {"matrix_lr": 0.0}, {"symmetries": 1, "recolor": "none"}])
def test_side_by_side_equals_one_by_one(planner, options):
    settings = SolveSettings(steps=5, batch=3, **options)
    tasks = small_tasks(10)
    together = side_by_side(planner, tasks, settings)
    own = own_accuracies(together.stacked, tasks, 3)
    votes = vote_many(together.stacked, tasks, settings, 3)
    for number, task in enumerate(tasks):
        alone = adapt(planner, task, settings)
        found = together.stacked.unstacked(number)
        assert together.steps == alone.steps == 5
        torch.testing.assert_close(together.losses[number], alone.losses, rtol=1e-9, atol=1e-9)
        for (name, a), (_, b) in zip(found.named_parameters(), alone.planner.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert own[number] == own_accuracy(found, task) == (alone.own_accuracy, alone.own_solved)
        single = vote(alone.planner, task, settings, task_rng(settings, f"{task.id}/vote"))
        for a, b in zip(votes[number], single, strict=True):
            assert [grid.tolist() for grid in a.attempts] == [grid.tolist() for grid in b.attempts]
            assert a.confidence == pytest.approx(b.confidence, rel=1e-6)


def test_the_clip_is_each_tasks_own(planner):
    tasks, settings = small_tasks(3), SolveSettings(steps=1, batch=2, clip=2.0)
    stacked = StackedPlanner(planner.agent, *stack_prompts(encodings(planner, tasks, settings), CPU))
    step = TrainingStep(stacked, tasks, settings)
    for stack in stacked.stacks:
        stack.grad += torch.tensor([0.0, 1e-3, 1.0]).view(3, *[1] * (stack.dim() - 1))
    count = sum(stack[0].numel() for stack in stacked.stacks)
    before = count**0.5 * torch.tensor([0.0, 1e-3, 1.0])
    torch.testing.assert_close(step.norms.measure().norm, before)
    step.norms.clip_(step.norms.measure(), step.clip)
    torch.testing.assert_close(step.norms.measure().norm, before.clamp(max=2.0), rtol=1e-5, atol=0)


def test_the_agent_stays_as_it_is(planner):
    before = {name: p.clone() for name, p in planner.state_dict().items()}
    side_by_side(planner, small_tasks(2), SolveSettings(steps=2, batch=2))
    after = planner.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_what_a_warm_up_did_is_undone(planner):
    tasks, settings = small_tasks(2), SolveSettings(steps=2, batch=2, average=0.5)
    stacked = StackedPlanner(planner.agent, *stack_prompts(encodings(planner, tasks, settings), CPU))
    step = TrainingStep(stacked, tasks, settings)
    fresh = [p.detach().clone() for p in stacked.stacks]
    step.optimizer.schedule(0, 1.0)
    step.step()
    assert not any(torch.equal(a, b) for a, b in zip(fresh, stacked.stacks, strict=True))
    step.optimizer.reset()
    for number in range(2):
        step.run(number, 0.5)
    step.optimizer.swap_in()
    other = StackedPlanner(planner.agent, *stack_prompts(encodings(planner, tasks, settings), CPU))
    again = TrainingStep(other, tasks, settings)
    for number in range(2):
        again.run(number, 0.5)
    again.optimizer.swap_in()
    assert all(torch.equal(a, b) for a, b in zip(other.stacks, stacked.stacks, strict=True))


def test_it_ends_where_its_time_ends(planner):
    done = side_by_side(planner, small_tasks(2), SolveSettings(steps=10**6, batch=2, task_seconds=0.5))
    assert 0 < done.steps < 10**6 and all(len(curve) == done.steps for curve in done.losses)
