"""One run as one self-contained page: figures, curves and grids in report.html, the pictures again in report/*.png.

Reads what is there of a run folder, so that a run can be looked at while it is under way or after it was killed:
config.yaml and metrics.jsonl as the trainer writes them (a row cut short is left out), examples.json as described in
examples.py, evaluation.json as {name of the set: `Evaluation.to_dict()`} with the set for the headline first, and
proof.json as `ProofReport.to_dict()`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from qwen_fused import figures, grids
from qwen_fused.examples import read_examples, write_examples

__all__ = ["read_metrics", "write_examples", "write_report"]

# batches of the expected course, [first, last), and the fall of the loss that is expected of them
COURSE = ((0, 10, None), (40, 60, 0.11), (90, 110, 0.19))
EVALUATED = [
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
RUNGS = {True: ("ok", "✓"), False: ("bad", "✗"), None: ("open", "–")}


def write_report(run_dir: str | Path) -> Path:
    """Draw a run folder; returns the path of its report.html.

    Raises:
        ValueError: there is no such folder, or one of its files is not what the trainer writes.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run_dir must be a run folder, got {run_dir}")
    config = _read(run_dir / "config.yaml", {}, yaml.safe_load)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    evaluation = _read_evaluation(run_dir / "evaluation.json")
    examples = read_examples(_read(run_dir / "examples.json", []), str(run_dir / "examples.json"))
    proof = _read_proof(run_dir / "proof.json")
    pictures = run_dir / "report"
    pictures.mkdir(exist_ok=True)

    charts = []
    for chart in figures.CHARTS:
        figure = figures.draw_chart(chart, metrics)
        if figure is not None:
            svg = figures.to_svg(figure, chart.name)
            charts.append({"chart": chart, "svg": svg, "read": figures.readings(figure, chart, metrics)})
            _replace(pictures / f"{chart.name}.png", figures.to_png(figure))
    for outdated in pictures.glob("example-*.png"):
        outdated.unlink()
    for number, example in enumerate(examples):
        figure = grids.draw_grids(f"{example.task_id}  ·  {example.verdict}", example.row)
        _replace(pictures / f"example-{number + 1:02d}.png", figures.to_png(figure))

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": _share, "short": _short, "uri": grids.grid_uri}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    template = environment.from_string(resources.files("qwen_fused").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        name=run_dir.resolve().name,
        config=config,
        batches=len(metrics["step"]),
        window=figures.mean_window(len(metrics["step"])),
        tiles=_tiles(metrics, evaluation),
        course=_course(metrics),
        evaluation=evaluation,
        charts=charts,
        examples=examples,
        proof=proof,
        light=figures.INK,
        arc=grids.ARC_COLORS,
        arc_colors=["#" + bytes(color).hex() for color in grids.ARC_COLORS],
        error_colors=["#" + bytes(color).hex() for color in grids.ERROR_COLORS],
    )
    _replace(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl as float64 [steps], NaN where a row has no number; rows cut short are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    keys = {"step": None} | {key: None for row in rows for key in row}
    return {key: np.array([_number(row.get(key)) for row in rows], dtype=np.float64) for key in keys}


def _tiles(metrics: Mapping[str, np.ndarray], evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline: label, figure, and what to hold it against."""
    tiles = []
    if evaluation:
        name, result = next(iter(evaluation.items()))
        tiles += [
            {
                "label": f"Solved exactly, {name}",
                "figure": f"{_count(result['pass_at_2'], result['scored'])} of {result['scored']}",
                "note": f"two attempts; copying the input: {_count(result['copy_solved'], result['scored'])}",
            },
            {
                "label": f"Cells right, {name}",
                "figure": _share(result["cell_accuracy"]),
                "note": f"copying the input: {_share(result['copy_cell_accuracy'])}",
            },
            {
                "label": f"Sizes right, {name}",
                "figure": _share(result["size_accuracy"]),
                "note": f"{result['tasks']} tasks, {result['episodes']} test inputs",
            },
        ]
    steps = len(metrics["step"])
    if not steps:
        return tiles
    last = slice(-min(50, steps), None)
    mean = {key: _mean(values[last]) for key, values in metrics.items()}
    first = _mean(metrics.get("loss", np.full(1, np.nan))[:10])
    grad = metrics.get("qwen_grad", np.full(steps, np.nan))
    zero = int((grad[1:] == 0).sum())
    tiles += [
        {"label": "Loss", "figure": _short(mean.get("loss")), "note": f"first 10 batches: {_short(first)}"},
        {
            "label": "Qwen_grad",
            "figure": _short(mean.get("qwen_grad")),
            "note": "never 0 after the first batch" if not zero else f"0 in {zero} of {steps - 1} batches",
        },
        {"label": "Mask_ratio", "figure": _short(mean.get("mask_ratio")), "note": "share of cells wrong in training"},
        {"label": "Reward", "figure": _short(mean.get("reward")), "note": "above 0: the policy helps"},
        {
            "label": "Episodes/s",
            "figure": _short(mean.get("episodes_per_second")),
            "note": "data, forward, backward and step",
        },
    ]
    return tiles


def _course(metrics: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Means over the batches that the expected course names, and over the last 50."""
    steps = len(metrics["step"])
    rows: list[dict[str, Any]] = []
    spans = [(f"batches {a} to {b}", slice(a, b), expected) for a, b, expected in COURSE if steps >= b]
    if steps > 110:
        spans.append(("last 50 batches", slice(-50, None), None))
    for label, span, expected in spans:
        row: dict[str, Any] = {"label": label, "expected": expected}
        for key in ("loss", "qwen_grad", "mask_ratio", "reward", "accuracy"):
            row[key] = _mean(metrics[key][span]) if key in metrics else math.nan
        row["change"] = row["loss"] / rows[0]["loss"] - 1 if rows and rows[0]["loss"] else None
        row["met"] = None if expected is None or row["change"] is None else row["change"] <= -expected
        rows.append(row)
    return rows


def _read_evaluation(path: Path) -> dict[str, Any]:
    evaluation = _read(path, {})
    for name, result in evaluation.items():
        missing = [key for key in EVALUATED if not isinstance(result, dict) or key not in result]
        if missing:
            raise ValueError(f'{path}: the set "{name}" must have {", ".join(missing)}')
    return evaluation


def _read_proof(path: Path) -> dict[str, Any]:
    proof = _read(path, {})
    rungs = proof.get("rungs", {})
    if not isinstance(rungs, dict) or not all(isinstance(rung, dict) for rung in rungs.values()):
        raise ValueError(f"{path}: rungs must be an object of objects")
    ladder = [
        {"name": name, "state": RUNGS.get(rung.get("ok"), RUNGS[None]), "detail": rung.get("detail", "")}
        for name, rung in rungs.items()
    ]
    return {"verdict": proof.get("verdict", ""), "rungs": ladder, "cut": proof.get("cut")} if ladder else {}


def _read(path: Path, missing: Any, parse: Callable[[str], Any] = json.loads) -> Any:
    """A file's content, `missing` where there is no file; ValueError names the file that is not as it should be."""
    if not path.exists():
        return missing
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, type(missing)):
        raise ValueError(f"{path} must hold a {type(missing).__name__}, got a {type(content).__name__}")
    return content


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _count(share: float | None, total: int) -> int:
    return round((share or 0) * total)


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def _short(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return text.replace("-", "−", 1) if value < 0 else text
