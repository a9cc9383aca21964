"""Workers of a start: what they are told and tell comes whole, and one that dies changes nothing."""

from __future__ import annotations

import copy
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from forked_workers import StandIn, make_task, use_forked_workers

from qwen_fused.solver import start_worker
from qwen_fused.solver.question import job_bytes
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.start_message import Asked, read_trained, trained_bytes
from qwen_fused.solver.start_training import Drawn, Trained, mean_of_all, train_one
from qwen_fused.solver.start_workers import StartWorkers
from qwen_fused.solver.task_planner import encode_task

INNER = SolveSettings(steps=2, batch=2)


@pytest.fixture(autouse=True)
def forked(monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setattr(start_worker, "train_one", training)
    use_forked_workers(monkeypatch)


def training(agent, one: Drawn, encoded, inner) -> Trained:
    """Where the first word of the task's id says so, the worker dies, the first time or always."""
    assert one.task.test == () and torch.get_num_threads() == 1
    fault, path = one.task.id.split("-")[0], os.path.join(os.environ["STAND_IN"], one.task.id)
    if fault == "raises":
        raise MemoryError("unable to allocate 7 TiB")
    if fault == "killed" and not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_one(agent, one, encoded, inner)


def chosen_of(*names: str) -> list[Drawn]:
    return [Drawn(make_task(name, pairs=3), 1, 5) for name in names]


def start_of(planner: StandIn):
    """Another agent than the planner's own, which the workers are started with."""
    agent = copy.deepcopy(planner.agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(1.5)
    return agent


def train(*names: str, count: int = 2, **options) -> Trained | None:
    planner, chosen = StandIn(), chosen_of(*names)
    encoded = [encode_task(planner, one.task, 8) for one in chosen]
    with StartWorkers(job_bytes(planner, INNER), count) as workers:
        found = workers.train(start_of(planner), chosen, encoded, **options)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    return found


def assert_same(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    for ours, theirs in ((one.weights, other.weights), (one.gradients, other.gradients)):
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_any_number_of_workers_leads_where_this_process_does():
    names, planner = ("task1", "task2", "task3"), StandIn()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    agent = start_of(planner)
    each = [train_one(agent, one, encode_task(planner, one.task, 8), INNER) for one in chosen_of(*names)]
    torch.set_num_threads(threads)
    called = []
    assert_same(train(*names, count=1, meanwhile=lambda: called.append(1)), mean_of_all(each))
    assert_same(train(*names, count=3), mean_of_all(each))
    assert called == [1] and len(set(mean_of_all(each).losses)) == 3


def test_a_worker_that_dies_changes_nothing(tmp_path):
    found = train("task1", "killed-1", "task2", "killed-2")
    assert (tmp_path / "killed-1").exists() and (tmp_path / "killed-2").exists()
    assert_same(found, train("task1", "killed-1", "task2", "killed-2"))


def test_a_training_that_no_worker_survives_is_told():
    with pytest.raises(
        RuntimeError, match=r"task raises-1 could not be .* code 71 \(MemoryError: unable to allocate 7 T"
    ):
        train("task1", "raises-1", "task2")


def test_asked_to_stop_leaves_the_batch():
    assert train("task1", "task2", should_stop=lambda: True) is None


def test_workers_that_cannot_start_are_told(monkeypatch):
    monkeypatch.undo()
    command = (sys.executable, "-c", "print('no such library'); raise SystemExit(4)")
    planner = StandIn()
    with (
        pytest.raises(RuntimeError, match=r"must start, but its worker process ended with code 4 \(no such library\)"),
        StartWorkers(job_bytes(planner, INNER), 1, command) as workers,
    ):
        workers.train(planner.agent, chosen_of("task1"), [encode_task(planner, make_task("task1"), 8)])


def test_messages_come_back_bit_for_bit_and_without_test_pairs():
    (one,) = chosen_of("task1")
    one = replace(one, left_out=2, seed=2**31 - 1)
    planner = StandIn()
    weights, encoded = dict(planner.agent.named_parameters()), encode_task(planner, one.task, 8)
    asked = Asked.from_bytes(Asked(weights, one, encoded).to_bytes())
    assert asked.one.task.test == () and (asked.one.left_out, asked.one.seed) == (2, 2**31 - 1)
    for ours, theirs in zip(asked.one.task.train, one.task.train, strict=True):
        assert (ours.input == theirs.input).all() and (ours.output == theirs.output).all()
    assert all(torch.equal(a, b) for a, b in zip(asked.encoded, encoded, strict=True))
    assert all(torch.equal(asked.weights[name], weights[name]) for name in weights)
    found = Trained(weights, {name: p / 3 for name, p in weights.items()}, [1 / 3, float("nan")])
    back = read_trained(trained_bytes(found))
    assert back.losses[0] == 1 / 3 and all(torch.equal(back.gradients[n], found.gradients[n]) for n in weights)
