"""A learned start is nearer to tasks than what it began from, and leaves the run's own agent alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_workers import use_forked_workers

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import start as module
from qwen_fused.solver.adapt import adapt_agent, step_weights
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.start import Start, draw, learn_start, smaller_half, with_agent
from qwen_fused.solver.start_training import Drawn, Trained, mean_of_all, train_one, train_side_by_side
from qwen_fused.solver.task_planner import encode_task, plan_loss

TINY = {"agent_channels": 16, "prompt_dim": 16, "plan_steps": 2, "policy_hidden": 8}


@pytest.fixture(scope="module")
def planner() -> QwenPlanner:
    torch.manual_seed(0)
    return QwenPlanner(TrainConfig(**TINY))


@pytest.fixture
def short(monkeypatch):
    use_forked_workers(monkeypatch)
    monkeypatch.setattr(module, "INNER", SolveSettings(steps=8, batch=4))


def recoloring(number: int, side: int = 3) -> Task:
    """3 becomes 7, in grids of its own."""
    rng, before, after = np.random.default_rng(number), 3, 7
    grids = [rng.integers(0, 2, (side, side)).astype(np.uint8) for _ in range(4)]
    made = [Pair((before * grid).astype(np.uint8), (after * grid).astype(np.uint8)) for grid in grids]
    return Task(f"recoloring-{number}", tuple(made[:3]), tuple(made[3:]))


TASKS = [recoloring(number) for number in range(12)]


def start_of(planner: QwenPlanner) -> Start:
    return Start(copy.deepcopy(planner.agent))


def last_loss(planner: QwenPlanner, agent, task: Task) -> float:
    return adapt_agent(agent, encode_task(planner, task, 8), task, module.INNER).losses[-1]


def test_others_are_nearer_afterwards_and_the_agent_is_as_it_was(planner, short):
    before = copy.deepcopy(planner.state_dict())
    start, told = start_of(planner), []
    learn_start(planner, TASKS, start, most=40, on_task=told.append)
    assert start.done and start.tasks == 40 and told == list(range(2, 41, 2)) and len(start.curve) == 40
    assert all(torch.equal(tensor, before[name]) for name, tensor in planner.state_dict().items())
    unseen = [recoloring(number) for number in range(100, 104)]
    from_start, from_agent = ([last_loss(planner, a, task) for task in unseen] for a in (start.agent, planner.agent))
    assert np.mean(from_start) < 0.6 * np.mean(from_agent)
    assert np.mean(start.curve[-6:]) < np.mean(start.curve[:6])
    assert "after 8 steps" in start.describe()


def test_stopped_and_gone_on_with_by_other_workers_it_is_the_same_start(planner, short):
    whole, parts = start_of(planner), start_of(planner)
    learn_start(planner, TASKS, whole, most=5, workers=1)
    learn_start(planner, TASKS, parts, most=5, should_stop=lambda: parts.tasks == 2)
    assert parts.tasks == 2 and not parts.done
    learn_start(planner, TASKS, parts, most=5, workers=2)
    assert parts.done and parts.curve == whole.curve and len(whole.curve) == 5
    for name, tensor in whole.agent.state_dict().items():
        assert torch.equal(tensor, parts.agent.state_dict()[name])


def test_the_clock_ends_it_too(planner, short):
    start = start_of(planner)
    learn_start(planner, TASKS, start, most=10**6, seconds=0.3)
    assert start.done and 0 < start.tasks < 1000


def test_only_train_pairs_of_the_smaller_half_are_trained_on(planner, short, monkeypatch):
    seen = set()
    monkeypatch.setattr(module, "encode_task", lambda p, task, n: seen.add(task.id) or encode_task(p, task, n))
    blind = [replace(task, test=tuple(Pair(pair.input, None) for pair in task.test)) for task in TASKS]
    large = [replace(recoloring(number, side=9), test=()) for number in range(50, 60)]
    start = start_of(planner)
    learn_start(planner, [*large, *blind], start, most=11)
    assert seen == {task.id for task in smaller_half([*large, *blind])}
    assert len(seen) == 11 and seen < {task.id for task in TASKS}


def test_every_task_has_its_turn_in_another_order_each_time():
    turns = [[draw(TASKS, 12 * turn + place, 0).task.id for place in range(12)] for turn in range(3)]
    assert all(sorted(turn) == sorted(task.id for task in TASKS) for turn in turns) and turns[0] != turns[1]
    assert [draw(TASKS, k, 1).task.id for k in range(12)] != turns[0]
    many = [recoloring(number) for number in range(40)]
    order = [many.index(draw(many, number, 0).task) for number in range(40)]
    # those beside each other are alike in size
    assert all(order[k : k + 8] == sorted(order[k : k + 8]) for k in range(0, 40, 8)) and order != sorted(order)
    drawn = [draw(TASKS, number, 0) for number in range(36)]
    assert len({one.seed for one in drawn}) == 36 and {one.left_out for one in drawn} == {0, 1, 2}
    for one in drawn:
        assert len(one.rest.train) == 2 and one.asked.train == (one.task.train[one.left_out],)
        assert one.asked.train[0] not in one.rest.train and one.rest.test == one.asked.test == ()


def test_the_pair_left_out_is_recoloured_as_the_others_are():
    grids = [np.array([[0, 1, k], [k, 0, 1]], np.uint8) for k in (2, 3, 4)]
    task = Task("free", tuple(Pair(grid, grid) for grid in grids), ())
    # alone, every colour of a pair is in every pair, and none is free
    assert set(Drawn(task, 0, 0).asking(module.INNER).colors) == {*range(2, 10)}


def test_the_start_goes_less_and_less_far_and_further_for_more_tasks(planner):
    found = Trained(
        {name: torch.zeros_like(p) for name, p in planner.agent.named_parameters()},
        {name: torch.zeros_like(p) for name, p in planner.agent.named_parameters()},
        [1.0],
    )

    def left(tasks: int, share: float) -> float:
        start = start_of(planner)
        start.move(replace(found, losses=[1.0] * tasks), share)
        assert start.tasks == tasks
        return start.agent.readout_norm[0].item()

    assert left(1, 0.0) == pytest.approx(1 - module.RATE, rel=1e-4)
    assert left(1, 1.0) == pytest.approx(1 - module.RATE * module.LEAST, rel=1e-4)
    assert left(16, 0.0) == pytest.approx((1 - module.RATE) ** 16, rel=1e-3)


def test_a_task_is_trained_on_as_a_planner_is_shown_it(planner, short, monkeypatch):
    whole = next(task for task in load_tasks("arc1").tasks if task.id == "0b148d64")
    seen, made = [], module.draw
    monkeypatch.setattr(module, "draw", lambda tasks, *rest: seen.extend(tasks) or made(tasks, *rest))
    learn_start(planner, [whole], start_of(planner), most=1)
    assert [pair.input.shape for pair in seen[0].train] == [pair.output.shape for pair in whole.train]


def test_the_pair_left_out_is_asked_at_the_task_s_own_weights(planner, short):
    one = Drawn(TASKS[0], 1, 5)
    encoded = encode_task(planner, one.task, 8)
    found = train_one(planner.agent, one, encoded, module.INNER)
    adapted = adapt_agent(planner.agent, encoded, one.rest, replace(module.INNER, seed=5)).planner
    for name, p in adapted.agent.named_parameters():
        assert torch.equal(found.weights[name], p)
    batch = one.asking(module.INNER).batch()
    assert found.losses[0] == pytest.approx(
        plan_loss(*adapted(batch), batch, step_weights(planner.agent.steps, module.INNER.early_step_weight), 0.0).item()
    )
    norm = torch.stack([g.norm() for g in found.gradients.values()]).norm()
    assert 0 < norm <= 1.0001
    # along the gradient, and not by weight decay alone
    stays = dict(planner.agent.named_parameters())
    zeros = {name: torch.zeros_like(g) for name, g in found.gradients.items()}
    by_gradient, by_decay = start_of(planner), start_of(planner)
    by_gradient.move(replace(found, weights=stays), 0.0)
    by_decay.move(replace(found, weights=stays, gradients=zeros), 0.0)
    for name in ("core.mix", "readout.weight"):
        moved = by_gradient.agent.get_parameter(name) - by_decay.agent.get_parameter(name)
        large = found.gradients[name].abs() > 1e-4
        assert large.any() and (moved[large].sign() == -found.gradients[name][large].sign()).all()


def test_side_by_side_leads_where_one_by_one_does(planner, short):
    chosen = [Drawn(task, k, 5) for k, task in enumerate(TASKS[:3])]
    encoded = [encode_task(planner, one.task, 8) for one in chosen]
    each = [train_one(planner.agent, one, read, module.INNER) for one, read in zip(chosen, encoded, strict=True)]
    alone = mean_of_all(each)
    beside = train_side_by_side(planner.agent, chosen, encoded, module.INNER)
    assert alone.losses == pytest.approx(beside.losses, rel=1e-3)
    names = {name for name, _ in planner.agent.named_parameters()}
    assert set(alone.weights) == set(beside.weights) == set(alone.gradients) == set(beside.gradients) == names
    for name in names:
        torch.testing.assert_close(beside.weights[name], alone.weights[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(beside.gradients[name], alone.gradients[name], rtol=1e-2, atol=1e-4)


def test_a_planner_with_another_agent_shares_all_else(planner):
    agent = copy.deepcopy(planner.agent)
    other = with_agent(planner, agent)
    assert other.agent is agent and planner.agent is not agent and other.prompt is planner.prompt
    assert other.config is planner.config
