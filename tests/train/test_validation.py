"""How many tasks a run evaluates, with none held out too; every held-out id is in the submission."""

from __future__ import annotations

import json
import time

import pytest

from qwen_fused.cli.main import main
from qwen_fused.train import validation
from qwen_fused.train.loop import train


def of_run(folder):
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return evaluation, (folder / "train.log").read_text()


def test_a_run_that_holds_nothing_out(small_config, capsys):
    run = train(small_config(val_fraction=0.0, max_batches=3, eval_every=1, ttt_seconds=1.0))
    evaluation, said = of_run(run)
    assert list(evaluation) == ["training"] and evaluation["training"]["tasks"] == 12
    assert "12 training tasks, 0 held out" in said and "No task is held out" in said and "nan" not in said
    assert not (run / "submission.json").exists() and "nan" not in (run / "report.html").read_text().split("<svg")[0]
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    assert "it holds no task out; pass --split training or evaluation, or --dataset" in capsys.readouterr().err
    assert main(["eval", str(run), "--device", "cpu", "--split", "training"]) == 0


def test_a_list_of_ids_is_held_out(small_config, small_arc, tmp_path, capsys):
    wanted = sorted(path.stem for path in small_arc.iterdir())[2:4]
    (tmp_path / "ids.txt").write_text("\n".join(wanted))
    run = train(small_config(held_out=tmp_path / "ids.txt", max_batches=2))
    assert sorted(json.loads((run / "submission.json").read_text())) == wanted
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert sorted(json.loads((run / "submission-validation.json").read_text())) == wanted


def test_few_of_many_tasks_are_evaluated(small_config):
    run = train(small_config(val_fraction=0.5, max_eval_tasks=2, max_batches=2))
    evaluation, said = of_run(run)
    assert evaluation["validation"]["tasks"] == evaluation["training"]["tasks"] == 2
    assert "(2 of 6 held-out tasks)" in said
    submission = json.loads((run / "submission.json").read_text())
    asked = {record["task_id"] for record in evaluation["validation"]["records"]}
    assert len(submission) == 6 and asked < set(submission)


def test_a_run_of_minutes_has_as_many_for_its_end(small_config, monkeypatch):
    """With tasks that take long to ask, few are asked, and the end takes about what the run took."""
    asked, evaluate = [], validation.evaluate

    def slow(model, episodes, **options):
        time.sleep(0.2 * len(episodes))
        asked.append(len(episodes))
        return evaluate(model, episodes, **options)

    monkeypatch.setattr(validation, "evaluate", slow)
    # shares of 2.4, 1.2 and 2.4 s; at 0.2 s and a little an episode
    train(small_config(val_fraction=0.5, max_minutes=0.1, max_batches=1))
    watched_before, watched, held_out, training = asked
    assert watched_before == watched == 6 and 1 <= held_out <= 6 and 1 <= training <= 6
    asked.clear()
    train(small_config(val_fraction=0.5, max_batches=1))
    assert asked[1] > held_out or asked[1] >= 6
    assert asked[2] >= training


@pytest.mark.parametrize("start_minutes, seconds", [(None, 4.5), (2.0, 120.0)])
def test_how_long_a_start_is_learned(small_config, monkeypatch, start_minutes, seconds):
    """Three quarters of the run's minutes, or its own."""
    given = []
    monkeypatch.setattr(validation, "learn_run_start", lambda trainer, log, most: given.append(most))
    train(small_config(val_fraction=0.5, max_minutes=0.1, start_minutes=start_minutes, max_batches=1))
    assert given == [pytest.approx(seconds)]


@pytest.mark.parametrize(
    "seconds, asked, spent, most",
    [(10.0, 6, 3.0, 20), (-4.0, 6, 3.0, 1), (1.0, 6, 60.0, 1), (1.0, 1, 0.0, 999_999_999)],
)
def test_affordable(seconds, asked, spent, most):
    assert validation.affordable(seconds, asked, spent) == most
