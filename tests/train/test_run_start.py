"""A run learns a start for training on tasks, keeps it in a file of its own, and `solve` and `eval` begin from it."""

from __future__ import annotations

import copy
import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from forked_workers import make_task, use_forked_workers
from small_runs import SMALL

from qwen_fused.cli.main import main
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.solver import start as learning
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.start_workers import StartWorkers
from qwen_fused.train import adapted, run_start
from qwen_fused.train.loop import train
from qwen_fused.train.run_start import START, learn_run_start, read_start, with_start
from qwen_fused.train.saved import load_model
from qwen_fused.train.signals import Interrupted
from qwen_fused.train.solve_run import open_planner


@pytest.fixture
def config(small_config, monkeypatch):
    def off(*arguments, **options):
        raise RuntimeError("not what this is about")

    monkeypatch.setattr(adapted, "solve_tasks", off)
    monkeypatch.setattr(learning, "INNER", SolveSettings(steps=2, batch=2))
    use_forked_workers(monkeypatch)
    return small_config(max_batches=2, ttt_seconds=0.1, start_tasks=6, prove=False)


def test_a_run_learns_one_and_solve_and_eval_begin_from_it(config, monkeypatch, capsys):
    run = train(config)
    solve_begins_from_it(run)
    eval_begins_from_it_where_it_trains(run, monkeypatch)
    (run / START).write_bytes(b"nothing of the kind")
    assert main(["eval", str(run), "--ttt-steps", "1"]) == 2
    assert f"checkpoint {run / START} cannot be read" in capsys.readouterr().err


def solve_begins_from_it(run):
    log = (run / "train.log").read_text()
    assert "A start from 6 trainings on training tasks: median loss on a pair left out after 2 steps on the " in log
    model = load_model(run)
    start = read_start(run / START, model.agent)
    assert start.done and start.tasks == 6 and len(start.curve) == 6
    planner, told = open_planner(run, "last", SolveSettings(), "cpu")
    assert told.endswith("and the start it learned from 6 trainings on tasks.")
    for name, tensor in start.agent.state_dict().items():
        assert torch.equal(planner.agent.state_dict()[name], tensor)
    assert not torch.equal(start.agent.encode.weight, model.agent.encode.weight)
    # without a step a run answers as it is
    plain, told = open_planner(run, "last", SolveSettings(steps=0), "cpu")
    assert "start" not in told and torch.equal(plain.agent.encode.weight, model.agent.encode.weight)


def eval_begins_from_it_where_it_trains(run, monkeypatch):
    from qwen_fused.cli import eval_command

    used = []

    def evaluation(model, tasks, steps=0):
        used.append(copy.deepcopy(model.agent))
        from qwen_fused.arc.scoring import Evaluation, copied

        return Evaluation(tuple(record for task in tasks for record in copied(task)))

    monkeypatch.setattr(eval_command, "plain_evaluation", evaluation)
    monkeypatch.setattr(eval_command, "adapted_evaluation", evaluation)
    assert main(["eval", str(run)]) == 0 and main(["eval", str(run), "--ttt-steps", "1"]) == 0
    model = load_model(run)
    start = with_start(model, run)[0].agent
    assert torch.equal(used[0].encode.weight, model.agent.encode.weight)
    assert torch.equal(used[1].encode.weight, start.encode.weight)


@pytest.mark.parametrize("changes", [{"start_tasks": 0}, {"agent": "conv"}])
def test_left_out(config, changes):
    run = train(replace(config, **changes))
    assert not (run / START).exists() and "A start" not in (run / "train.log").read_text()
    assert with_start(load_model(run), run)[1] == 0


def test_interrupted_and_gone_on_with(config, monkeypatch):
    whole = read_start(train(config) / START, load_model(next(config.out.iterdir())).agent)
    real, count = StartWorkers.train, []

    def interrupting(*arguments):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(StartWorkers, "train", interrupting)
    again = replace(config, out=config.out.parent / "again")
    with pytest.raises(Interrupted):
        train(again)
    (run,) = again.out.iterdir()
    assert "Interrupted after 2 tasks of the start" in (run / "train.log").read_text()
    assert json.loads((run / "evaluation.json").read_text())
    train(replace(again, resume=run))
    start = read_start(run / START, load_model(run).agent)
    assert start.done and start.curve == whole.curve
    # and once it is done it is kept
    monkeypatch.setattr(run_start, "learn_start", None)
    train(replace(again, resume=run))


@pytest.mark.parametrize("first", [1, 2])
def test_what_was_learned_before_workers_failed_is_kept(first, config, monkeypatch, tmp_path):
    real, count, said = StartWorkers.train, [], []

    def failing(*arguments):
        count.append(1)
        if len(count) == first:
            raise RuntimeError("a worker must start, but it does not")
        return real(*arguments)

    monkeypatch.setattr(StartWorkers, "train", failing)
    log = SimpleNamespace(say=said.append, progress=lambda *_: nullcontext(lambda done: None))
    model = QwenPlanner(TrainConfig(**{**SMALL, "start_tasks": 6}))
    tasks = [make_task(f"task{number}", pairs=3) for number in range(6)]
    trainer = SimpleNamespace(config=config, folder=tmp_path, model=model, training=tasks, sharded=False)
    agent = learn_run_start(trainer, log)
    assert said[0] == "No more of a start is learned: a worker must start, but it does not"
    if first == 1:
        assert agent is None and len(said) == 1 and not (tmp_path / START).exists()
        return
    start = read_start(tmp_path / START, model.agent)
    assert start.tasks == 2 and not start.done and "A start from 2 trainings" in said[1]
    assert torch.equal(start.agent.encode.weight, agent.encode.weight)


def test_small_runs_of_other_tests_have_none():
    assert SMALL["start_tasks"] == 0
