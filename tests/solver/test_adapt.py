"""Test-time training learns a task from its demonstrations, repeatably, and from nothing else."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen_fused.arc.episodes import Pair, Task
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver.adapt import Average, Schedule, adapt
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_solver import solve_task

TINY = {"agent_channels": 16, "prompt_dim": 16, "plan_steps": 2, "policy_hidden": 8}


@pytest.fixture(scope="module")
def planner() -> QwenPlanner:
    torch.manual_seed(0)
    return QwenPlanner(TrainConfig(**TINY))


def recoloring(pairs: int = 3, side: int = 4) -> Task:
    """A task that is learned in seconds: 1 becomes 2."""
    rng = np.random.default_rng(0)
    grids = [rng.integers(0, 2, (side, side + 1)).astype(np.uint8) for _ in range(pairs + 1)]
    made = [Pair(grid, (2 * grid).astype(np.uint8)) for grid in grids]
    return Task("recoloring", tuple(made[:-1]), tuple(made[-1:]))


def weights(adapted) -> list[torch.Tensor]:
    return [p.detach() for p in adapted.planner.parameters()]


def test_learns_a_task_and_answers_it(planner):
    task = recoloring()
    answer = solve_task(planner, task, SolveSettings(steps=80))
    assert answer.losses[-1] < 0.2 * answer.losses[0] and len(answer.losses) == answer.steps == 80
    assert answer.own_solved == answer.own_accuracy == 1
    np.testing.assert_array_equal(answer.attempts[0][0], task.test[0].output)
    assert answer.confidence[0] > 0.7


def test_repeatable_and_the_planner_stays_as_it_is(planner):
    before = {name: p.clone() for name, p in planner.state_dict().items()}
    settings = SolveSettings(steps=4)
    first, second = (adapt(planner, recoloring(), settings) for _ in range(2))
    assert first.losses == second.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    other = adapt(planner, recoloring(), replace(settings, seed=1))
    assert other.losses != first.losses
    assert all(torch.equal(p, before[name]) for name, p in planner.state_dict().items())


@pytest.mark.parametrize("output", [None, np.full((7, 3), 9, np.uint8)])
def test_an_answer_in_the_file_changes_no_prediction(planner, output):
    task = recoloring()
    changed = replace(task, test=tuple(replace(pair, output=output) for pair in task.test))
    settings = SolveSettings(steps=3)
    one, two = (solve_task(planner, t, settings) for t in (task, changed))
    assert one.losses == two.losses and one.confidence == two.confidence
    for a, b in zip(one.attempts[0], two.attempts[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_lone_pair_is_trained_on_itself(planner):
    answer = solve_task(planner, recoloring(pairs=1), SolveSettings(steps=60))
    assert answer.own_solved == 1


def test_no_step_answers_with_the_planner_as_it_is(planner):
    adapted = adapt(planner, recoloring(), SolveSettings(steps=0))
    agent = dict(planner.agent.named_parameters())
    assert adapted.steps == 0 and adapted.losses == ()
    assert all(torch.equal(p, agent[name]) for name, p in adapted.planner.agent.named_parameters())


def test_a_deadline_that_has_passed_ends_at_once(planner):
    assert adapt(planner, recoloring(), SolveSettings(steps=50), deadline=time.monotonic() - 1).steps == 0


def test_a_time_limit_ends_in_the_middle(planner):
    adapted = adapt(planner, recoloring(), SolveSettings(steps=1_000_000, task_seconds=0.5))
    assert 0 < adapted.steps < 1_000_000 and adapted.seconds < 10


def test_every_weight_moves_and_the_largest_grids_fit(planner):
    rng = np.random.default_rng(0)
    # sizes without a rule, so that the size head learns too
    pairs = tuple(
        Pair(rng.integers(0, 10, (30, 30)).astype(np.uint8), rng.integers(0, 10, shape).astype(np.uint8))
        for shape in ((30, 29), (28, 30))
    )
    adapted = adapt(planner, Task("large", pairs, pairs[:1]), SolveSettings(steps=3, batch=4))
    start = dict(planner.agent.named_parameters())
    # the directions' second row is the backward plan's, and no part of this
    still = [n for n, p in adapted.planner.agent.named_parameters() if torch.equal(p, start[n])]
    assert still == []
    assert adapted.planner.offset.abs().sum() > 0


def test_steps_are_told(planner):
    told = []
    adapted = adapt(planner, recoloring(), SolveSettings(steps=3), on_step=lambda n, loss: told.append((n, loss)))
    assert told == list(enumerate(adapted.losses, start=1))


def test_the_schedule_warms_up_and_falls():
    settings = SolveSettings(steps=100, warmup=10, final_lr=0.1)
    shares = [Schedule(settings, 0.0, None).at(step) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and max(s for s in shares if s) == pytest.approx(0.919)
    assert shares[99] == pytest.approx(0.109) and shares[100] is None


def test_the_average_is_of_the_weights_along_the_way():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, 0.5)
    values = [0.0, 1.0, 3.0]
    mean = model.weight.item()
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * value
    average.swap_in()
    assert model.weight.item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", -1), ("batch", 0), ("symmetries", 4), ("average", 1.5), ("task_seconds", 0.0)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        SolveSettings(**{name: value})
