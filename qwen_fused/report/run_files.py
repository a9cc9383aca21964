"""The files of a run folder as its report needs them: each may be missing, rows that a kill cut short are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qwen_fused.common.typed_yaml import nearest
from qwen_fused.report.answers import Example, read_examples

EVALUATION_KEYS = [
    "episodes",
    "scored",
    "tasks",
    "tasks_solved",
    "pass_at_1",
    "pass_at_2",
    "cell_accuracy",
    "size_accuracy",
    "copy_cell_accuracy",
    "copy_solved",
]
# what prompts lose to the most tokens that they may have: {"told": a sentence or null, set: counts}
PROMPTS = "prompts.json"
RUNG_MARKS = {True: ("ok", "✓"), False: ("bad", "✗"), None: ("open", "–")}


def check_run(run: Path) -> None:
    """Raise a ValueError where `run` is no run folder; the message has the nearest one beside it."""
    if (run / "config.yaml").is_file():
        return
    beside = [f.parent.name for f in run.parent.glob("*/config.yaml")] if run.parent.is_dir() else []
    raise ValueError(f"run must be a run folder with a config.yaml, got {run}{nearest(run.name, beside)}")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl as float64 [steps], NaN where a row has no number; rows cut short are left out."""
    rows = list(read_rows(path))
    keys = {"step": None} | {key: None for row in rows for key in row}
    return {key: np.array([_number(row.get(key)) for row in rows], dtype=np.float64) for key in keys}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines that have a step."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def read_gradients(path: Path) -> list[dict[str, Any]]:
    """Rows of gradients.jsonl, {"step": int, "norms": {layer: float}}; what is no number is NaN."""
    rows = []
    for row in read_rows(path):
        norms = row.get("norms")
        if isinstance(norms, dict):
            rows.append({"step": row["step"], "norms": {name: _number(norm) for name, norm in norms.items()}})
    return rows


def read_predictions(path: Path) -> dict[int, list[Example]]:
    """Rows of predictions.jsonl as step -> the watched episodes' examples, in order; the last row of a step counts.

    Raises:
        ValueError: a row's examples are not as the trainer writes them.
    """
    steps: dict[int, Any] = {row["step"]: row.get("examples") for row in read_rows(path)}
    for step, content in steps.items():
        if not isinstance(content, list):
            raise ValueError(f"{path}: the examples of step {step} must be a list, got {type(content).__name__}")
    return {step: read_examples(steps[step], f"{path}, step {step}") for step in sorted(steps)}


def read_evaluation(path: Path) -> dict[str, Any]:
    """{name of the set: `Evaluation.to_dict()`}, empty where there is no file."""
    evaluation = read_file(path, {})
    for name, result in evaluation.items():
        missing = [key for key in EVALUATION_KEYS if not isinstance(result, dict) or key not in result]
        if missing:
            raise ValueError(f'{path}: the set "{name}" must have {", ".join(missing)}')
    return evaluation


def read_proof(path: Path) -> dict[str, Any]:
    """Verdict, rungs and cut of `ProofReport.to_dict()`, empty where there is no file."""
    proof = read_file(path, {})
    rungs = proof.get("rungs", {})
    if not isinstance(rungs, dict) or not all(isinstance(rung, dict) for rung in rungs.values()):
        raise ValueError(f"{path}: rungs must be an object of objects")
    ladder = [
        {"name": name, "state": RUNG_MARKS.get(rung.get("ok"), RUNG_MARKS[None]), "detail": rung.get("detail", "")}
        for name, rung in rungs.items()
    ]
    return {"verdict": proof.get("verdict", ""), "rungs": ladder, "cut": proof.get("cut")} if ladder else {}


def read_file(path: Path, missing: Any, parse: Callable[[str], Any] = json.loads) -> Any:
    """A file's content, `missing` where there is no file; ValueError names the file that is not as it should be."""
    if not path.exists():
        return missing
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, type(missing)):
        raise ValueError(f"{path} must hold a {type(missing).__name__}, got a {type(content).__name__}")
    return content


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
