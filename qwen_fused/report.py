"""One run as one self-contained page: figures, curves and grids in `report.html`, the pictures again in report/*.png.

Reads what is there of a run folder, so that a run can be looked at while it is under way or after it was killed:

- `config.yaml`, `metrics.jsonl`: as the trainer writes them; a row cut short is left out.
- `evaluation.json`: {name of the set: `Evaluation.to_dict()`}, "validation" first.
- `examples.json`: a list of {"task_id": str, "index": int, "input": grid, "target": grid or null, "predicted": grid,
  "plan": [grid of each planning step, first to last], "demonstrations": [[input, output], ...]}; the last two may be
  left out. A grid is a list of rows of colours. `write_examples` writes it.
- `proof.json`: `ProofReport.to_dict()`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from qwen_fused import figures
from qwen_fused.evaluate import cell_accuracy
from qwen_fused.figures import ARC_COLORS, CHARTS, ERROR_COLORS
from qwen_fused.tasks import parse_grid

# batches of the expected course, [first, last), and the fall of the loss that is expected of them
COURSE = ((0, 10, None), (40, 60, 0.11), (90, 110, 0.19))
RUNGS = {True: ("ok", "✓"), False: ("bad", "✗"), None: ("open", "–")}


def write_examples(path: str | Path, examples: Iterable[Mapping[str, Any]]) -> None:
    """Write examples.json; arrays and nested sequences of them become lists.

    Raises:
        ValueError: an example lacks a key, or one of its grids is not a grid; the message names both.
    """
    written = []
    for number, example in enumerate(examples):
        plain = {
            "task_id": str(_get(example, "task_id", number)),
            "index": int(_get(example, "index", number)),
            **{key: _plain(_get(example, key, number)) for key in ("input", "target", "predicted")},
            "plan": [_plain(grid) for grid in example.get("plan", ())],
            "demonstrations": [[_plain(grid) for grid in pair] for pair in example.get("demonstrations", ())],
        }
        _read_example(plain, f"examples[{number}]")
        written.append(plain)
    _replace(Path(path), json.dumps(written).encode())


def write_report(run_dir: str | Path) -> Path:
    """Draw a run folder; returns the path of its report.html.

    Raises:
        ValueError: there is no such folder, or one of its files is not what the trainer writes.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run_dir must be a run folder, got {run_dir}")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) if (run_dir / "config.yaml").exists() else {}
    evaluation = _read_json(run_dir / "evaluation.json", {})
    examples = [
        _read_example(example, f"{run_dir / 'examples.json'}[{number}]")
        for number, example in enumerate(_read_json(run_dir / "examples.json", []))
    ]
    pictures = run_dir / "report"
    pictures.mkdir(exist_ok=True)

    charts = []
    for chart in CHARTS:
        figure = figures.draw_chart(chart, metrics)
        if figure is not None:
            svg = figures.to_svg(figure, chart.name)
            charts.append({"chart": chart, "svg": svg, "read": figures.readings(figure, chart, metrics)})
            _replace(pictures / f"{chart.name}.png", figures.to_png(figure))
    for number, example in enumerate(examples):
        title = f"{example['task_id']}  ·  {example['verdict']}"
        _replace(pictures / f"example-{number + 1:02d}.png", figures.to_png(figures.draw_grids(title, _row(example))))

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "short": _short, "uri": figures.grid_uri}
    template = environment.from_string(resources.files("qwen_fused").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        name=run_dir.resolve().name,
        config=config or {},
        batches=len(metrics["step"]),
        window=figures.mean_window(len(metrics["step"])),
        tiles=_tiles(metrics, evaluation),
        course=_course(metrics),
        evaluation=evaluation,
        charts=charts,
        examples=examples,
        proof=_proof(_read_json(run_dir / "proof.json", {})),
        light=figures.INK,
        error_colors=["#" + bytes(color).hex() for color in ERROR_COLORS],
        arc_colors=["#" + bytes(color).hex() for color in ARC_COLORS],
        arc=ARC_COLORS,
        row=_row,
    )
    _replace(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl as float64 [steps], NaN where a row has no number; rows cut short are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
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
            "note": f"{steps} batches; figures are means of the last {min(50, steps)}",
        },
    ]
    return tiles


def _course(metrics: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Means over the batches that the expected course names, and over the last 50."""
    steps, rows = len(metrics["step"]), []
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


def _proof(proof: Mapping[str, Any]) -> dict[str, Any]:
    rungs = [
        {"name": name, "state": RUNGS[rung.get("ok")], **{key: rung.get(key) for key in ("detail", "parameters")}}
        for name, rung in proof.get("rungs", {}).items()
    ]
    return {"ok": proof.get("ok"), "rungs": rungs, "cut": proof.get("cut")} if rungs else {}


def _read_example(example: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An example with its grids checked and turned into arrays, scored, and given a size to be drawn at."""
    try:
        grids = {key: parse_grid(example[key]) for key in ("input", "predicted")}
        target = None if example["target"] is None else parse_grid(example["target"])
        plan = [parse_grid(grid) for grid in example.get("plan", [])]
        shown = [tuple(parse_grid(grid) for grid in pair) for pair in example.get("demonstrations", [])]
        task_id, index = example["task_id"], example["index"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not an example: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{where}: a grid {error}") from error
    predicted = grids["predicted"]
    solved = target is not None and np.array_equal(predicted, target)
    verdict = "no answer known"
    if target is not None:
        verdict = "solved" if solved else f"{_share(cell_accuracy(predicted, target))} of cells right"
    side = max(side for grid in (grids["input"], predicted, target, *plan) if grid is not None for side in grid.shape)
    return {
        **grids,
        "target": target,
        "plan": plan,
        "demonstrations": shown,
        "task_id": task_id,
        "index": index,
        "solved": solved,
        "verdict": verdict,
        # small grids large, large grids small: one cell size per example keeps its grids comparable
        "cell": int(np.clip(132 // side, 4, 18)),
    }


def _row(example: Mapping[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Caption, grid and colour table from input to error."""
    row = [("input", example["input"], ARC_COLORS)]
    row += [(f"step {number + 1}", grid, ARC_COLORS) for number, grid in enumerate(example["plan"])]
    row.append(("predicted", example["predicted"], ARC_COLORS))
    if example["target"] is not None:
        row.append(("target", example["target"], ARC_COLORS))
        row.append(("errors", figures.error_grid(example["predicted"], example["target"]), ERROR_COLORS))
    return row


def _get(example: Mapping[str, Any], key: str, number: int) -> Any:
    if key not in example:
        raise ValueError(f'examples[{number}] must have "{key}", got {", ".join(example)}')
    return example[key]


def _plain(grid: Any) -> Any:
    return None if grid is None else np.asarray(grid).tolist()


def _read_json(path: Path, missing: Any) -> Any:
    if not path.exists():
        return missing
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
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
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _short(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return text.replace("-", "−", 1) if value < 0 else text
