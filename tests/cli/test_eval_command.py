"""`qwen-fused eval`: on a run's tasks, on any others, after training on each; every id, and scores as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked_workers import stand_in, use_forked_workers
from kaggle_files import check_submission

from qwen_fused.cli.main import main

PAIR = {"input": [[1, 2]], "output": [[2, 1]]}


@pytest.fixture(scope="module")
def run(config_in, tmp_path_factory) -> Path:
    """A small run."""
    from qwen_fused.train.loop import train

    return train(config_in(tmp_path_factory.mktemp("runs"), max_batches=2))


def test_eval_of_other_tasks(run, kaggle, capsys):
    assert main(["eval", str(run), "--dataset", str(kaggle), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Cut to 2048 tokens: 1 of 6 prompts, without 1 of their 21 demonstration pairs. ")
    assert f"\n{kaggle.name}: 8 test inputs, pass@1 " in said
    check_submission(run / f"submission-{kaggle.name}.json", kaggle / "arc-agi_evaluation_challenges.json")
    file = kaggle / "arc-agi_test_challenges.json"
    assert main(["eval", str(run), "--dataset", str(file), "--device", "cpu"]) == 0
    assert "\narc-agi_test_challenges: 8 test inputs, not scored: no answer is known\n" in capsys.readouterr().out
    check_submission(run / "submission-arc-agi_test_challenges.json", file)


def test_eval_after_training_on_each_task(run, monkeypatch, capsys):
    use_forked_workers(monkeypatch, stand_in)
    assert main(["eval", str(run), "--ttt-steps", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held_out = json.loads((run / "submission-validation.json").read_text())
    assert len([line for line in lines if line.startswith("[")]) == len(held_out) == 3
    assert "validation: 3 test inputs, pass@1" in lines[-3]


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--split test", "split must be one of validation, training, evaluation without --dataset, got 'test'"),
        ("--ttt-steps -1", "ttt_steps must be a number of at least 0, got -1"),
        ("--dataset arc9", 'dataset must be arc1, arc2, a folder or a file, got "arc9"'),
        ("--dataset arc1 --split validation", 'split of "arc1" must be one of training, evaluation, got "validation"'),
    ],
)
def test_eval_names_what_is_wrong(run, flags, told, capsys):
    assert main(["eval", str(run), "--device", "cpu", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qwen-fused: {told}") and len(error.splitlines()) == 1, error


def evaluated(run: Path, *flags: str) -> tuple[dict, dict]:
    """Submission and score of `eval --dataset FILE`."""
    assert main(["eval", str(run), "--device", "cpu", *flags]) == 0
    name = "-".join(Path(flag).stem for flag in flags if not flag.startswith("--"))
    return tuple(json.loads((run / f"{what}-{name}.json").read_text()) for what in ("submission", "score"))


def test_every_id_is_answered_and_what_cannot_be_asked_is_named(run, tmp_path, capsys):
    """One demonstration is enough; a task without any, or with an input that is no grid, counts as unsolved."""
    tasks = {
        "one": {"train": [PAIR], "test": [PAIR]},
        "none": {"train": [], "test": [PAIR, {"input": [[3]]}]},
        "ragged": {"train": [PAIR] * 2, "test": [{"input": [[1], [2, 3]], "output": [[1]]}]},
    }
    (tmp_path / "mixed.json").write_text(json.dumps(tasks))
    submission, score = evaluated(run, "--dataset", str(tmp_path / "mixed.json"))
    assert {name: len(tests) for name, tests in submission.items()} == {"none": 2, "one": 1, "ragged": 1}
    assert submission["none"] == [{f"attempt_{k}": grid for k in (1, 2)} for grid in ([[1, 2]], [[3]])]
    assert submission["ragged"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]
    assert score["tasks"] == 3 and score["episodes"] == 4 and score["scored"] == 3
    assert score["unanswered"] == ["none", "ragged"] and score["by_task"]["none"] is None
    assert score["by_task"]["ragged"] == 0.0 and score["pass_at_2"] == pytest.approx(score["by_task"]["one"] / 3)
    said = capsys.readouterr().out
    assert "2 tasks can't be asked: their queries stand for their answers: none, ragged" in said
    assert said.count("Left out: ") == 2 and "task none: " in said and "nan" not in said


def test_a_split_whose_answers_nobody_knows(run, kaggle, capsys):
    submission, score = evaluated(run, "--dataset", str(kaggle), "--split", "test")
    check_submission(run / f"submission-{kaggle.name}-test.json", kaggle / "arc-agi_test_challenges.json")
    assert score["scored"] == 0 and score["pass_at_2"] is None and set(score["by_task"].values()) == {None}
    said = capsys.readouterr().out
    assert f"{kaggle.name}-test: 8 test inputs, not scored: no answer is known\n" in said and "nan" not in said


def test_the_score_is_the_evaluations(run, capsys):
    submission, score = evaluated(run, "--split", "training")
    assert set(submission) == set(score["by_task"]) and len(submission) == score["tasks"] == 9
    assert f"pass@2 {score['pass_at_2']:.4f}" in capsys.readouterr().out


def test_tasks_that_lie_together_have_no_evaluation_split(run, capsys):
    assert main(["eval", str(run), "--split", "evaluation", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert 'has no split "evaluation": its tasks lie together' in said and said.count("\n") == 1


def test_several_data_sets_at_once(run, kaggle, tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps({"own": {"train": [PAIR], "test": [PAIR]}}))
    both = f"{kaggle},{tmp_path / 'own.json'}"
    assert main(["eval", str(run), "--dataset", both, "--device", "cpu"]) == 0
    assert len(json.loads((run / "submission-own.json").read_text())) == 7
    assert main(["eval", str(run), "--dataset", both, "--split", "evaluation", "--device", "cpu"]) == 0
    assert len(json.loads((run / "submission-own-evaluation.json").read_text())) == 6
    assert 'own.json has no split "evaluation": its tasks lie together, and are left out' in capsys.readouterr().out
