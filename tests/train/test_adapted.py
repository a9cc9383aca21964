"""A run ends with its held-out tasks answered again, after training on each: a line, a set, a tile."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from forked_workers import StandIn, stand_in, use_forked_workers

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.arc.tasks import Pair
from qwen_fused.solver.task_solver import TaskAnswer
from qwen_fused.train import adapted
from qwen_fused.train.loop import train
from qwen_fused.train.signals import Interrupted


@pytest.fixture
def config(small_config):
    return small_config(max_batches=2, ttt_seconds=2.5)


@pytest.fixture
def knowing(monkeypatch, small_arc):
    """Workers that know every answer, and the settings that they were given."""
    answers = {task.id: task for task in load_tasks(str(small_arc)).tasks}

    def solve_task(planner, task, settings, *, deadline=None) -> TaskAnswer:
        assert settings.task_seconds == 2.5 and all(
            isinstance(pair, Pair) and pair.output is None for pair in task.test
        )
        answer = stand_in(planner, task, settings)
        attempts = tuple((pair.output, pair.output) for pair in answers[task.id].test)
        return replace(answer, attempts=attempts, seconds=1.5)

    use_forked_workers(monkeypatch, solve_task)


def test_its_own_line_and_set_and_tile(config, knowing):
    run = train(config)
    (line,) = [line for line in (run / "train.log").read_text().splitlines() if line.startswith("Held-out tasks after")]
    assert line.startswith(
        "Held-out tasks after 2.5 s of training on each: 3 of 3 solved (before 0), pass@2 1.0000 (before"
    )
    assert line.endswith("1.5 s a task")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation) == ["validation", "training", "validation, adapted"]
    after, before = evaluation["validation, adapted"], evaluation["validation"]
    assert after["pass_at_2"] == 1.0 and after["seconds_a_task"] == 1.5 and before["pass_at_2"] == 0.0
    assert [record["task_id"] for record in after["records"]] == [record["task_id"] for record in before["records"]]
    page = (run / "report.html").read_text()
    assert "After training on each task" in page and "3 of 3" in page and "solved exactly; 1.5 s a task" in page


def test_off_at_zero(config, monkeypatch):
    monkeypatch.setattr(adapted, "solve_tasks", None)
    run = train(replace(config, ttt_seconds=0.0))
    assert "Held-out tasks" not in (run / "train.log").read_text()
    assert list(json.loads((run / "evaluation.json").read_text())) == ["validation", "training"]


def test_the_agent_of_older_runs_is_left_out(config, monkeypatch):
    monkeypatch.setattr(adapted, "solve_tasks", None)
    run = train(replace(config, agent="conv"))
    told = "Held-out tasks are not trained on: training on a task needs a run with --agent lines, got one with conv"
    assert told in (run / "train.log").read_text()
    assert list(json.loads((run / "evaluation.json").read_text())) == ["validation", "training"]


def test_a_run_is_whole_without_it(config, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a worker must start, but its worker process ended with code 4")

    monkeypatch.setattr(adapted, "solve_tasks", broken)
    run = train(config)
    assert "Held-out tasks could not be trained on: a worker must start" in (run / "train.log").read_text()
    assert (run / "report.html").exists() and len(json.loads((run / "evaluation.json").read_text())) == 2


def test_a_signal_ends_it_after_the_evaluation_was_written(config, monkeypatch):
    def stopped(model, tasks, settings, *, should_stop, **options):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop() == signal.SIGTERM

    monkeypatch.setattr(adapted, "solve_tasks", stopped)
    with pytest.raises(Interrupted) as ended:
        train(config)
    assert ended.value.exit_code == 143
    (run,) = config.out.iterdir()
    assert len(json.loads((run / "evaluation.json").read_text())) == 2


def test_shards_are_left_out(config, monkeypatch):
    class Sharded:
        sharded, model = True, StandIn()

    said = []
    trainer, log = Sharded(), type("Log", (), {"say": said.append})
    trainer.config = config
    assert adapted.evaluate_adapted(trainer, trainer.model, (), None, log) is None and "Qwen is in shards" in said[0]
