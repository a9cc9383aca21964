"""One run as one self-contained page: figures, curves and grids in report.html, the pictures again in report/*.png.

Reads what is there of a run folder, so that a run can be looked at while it is under way or after it was killed:
config.yaml, metrics.jsonl, gradients.jsonl and predictions.jsonl as the trainer writes them (a row cut short is left
out), examples.json as described in answers.py, evaluation.json as {name of the set: `Evaluation.to_dict()`} with the
set for the headline first, and proof.json as `ProofReport.to_dict()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure

from qwen_fused.common.files import write_atomic
from qwen_fused.report import curves, draw_grids, heatmaps
from qwen_fused.report.answers import Example, read_examples
from qwen_fused.report.run_files import (
    PROMPTS,
    read_evaluation,
    read_file,
    read_gradients,
    read_metrics,
    read_predictions,
    read_proof,
)

# batches of the expected course, [first, last), and the fall of the loss that is expected of them
COURSE = ((0, 10, None), (40, 60, 0.11), (90, 110, 0.19))
# snapshots of a film, tasks of the list of the hardest
FRAMES, HARDEST = 8, 8


def write_report(run_dir: str | Path) -> Path:
    """Draw a run folder; returns the path of its report.html.

    Raises:
        ValueError: there is no such folder, or one of its files is not what the trainer writes.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run_dir must be a run folder, got {run_dir}")
    config = read_file(run_dir / "config.yaml", {}, yaml.safe_load)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    evaluation = read_evaluation(run_dir / "evaluation.json")
    examples = read_examples(read_file(run_dir / "examples.json", []), str(run_dir / "examples.json"))
    films = _films(read_predictions(run_dir / "predictions.jsonl"))
    gradients = read_gradients(run_dir / "gradients.jsonl")
    proof = read_proof(run_dir / "proof.json")
    # the headline's set: what was held out
    held_out: dict[str, Any] = next(iter(evaluation.values()), {})
    records = held_out.get("records", [])
    pictures = run_dir / "report"
    pictures.mkdir(exist_ok=True)
    for outdated in pictures.glob("example-*.png"):
        outdated.unlink()

    def svg(name: str, figure: Figure | None) -> str:
        """The figure for the page; it is a PNG beside it too."""
        if figure is None:
            return ""
        write_atomic(pictures / f"{name}.png", curves.to_png(figure))
        return curves.to_svg(figure, name)

    charts = []
    for chart in curves.CHARTS:
        figure = curves.draw_chart(chart, metrics)
        if figure is not None:
            read = curves.hover_data(figure, chart, metrics)
            charts.append({"chart": chart, "svg": svg(chart.name, figure), "read": read})
    heatmaps_drawn = {
        "layers": svg("layers", heatmaps.draw_gradients(gradients)),
        "sizes": svg("sizes", heatmaps.draw_sizes(records)),
        "tasks": svg("tasks", heatmaps.draw_tasks(records)),
    }
    for number, example in enumerate(examples):
        figure = draw_grids.draw_grids(f"{example.task_id}  ·  {example.verdict}", example.row)
        write_atomic(pictures / f"example-{number + 1:02d}.png", curves.to_png(figure))

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": _share, "short": _short, "uri": draw_grids.grid_uri}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    template = environment.from_string(resources.files("qwen_fused.report").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        name=run_dir.resolve().name,
        config=config,
        batches=len(metrics["step"]),
        window=curves.mean_window(len(metrics["step"])),
        recent=_recent(len(metrics["step"])),
        tiles=_tiles(metrics, evaluation),
        cut=read_file(run_dir / PROMPTS, {}).get("told"),
        truncated=_mean(metrics.get("truncated", np.zeros(0))),
        course=_course(metrics),
        evaluation=evaluation,
        charts=charts,
        heatmaps=heatmaps_drawn,
        hardest=heatmaps.task_means(records)[:HARDEST],
        films=films,
        examples=[(why, [e for e in examples if e.why == why]) for why in dict.fromkeys(e.why for e in examples)],
        proof=proof,
        light=curves.INK,
        arc=draw_grids.ARC_COLORS,
        arc_colors=["#" + bytes(color).hex() for color in draw_grids.ARC_COLORS],
        error_colors=["#" + bytes(color).hex() for color in draw_grids.ERROR_COLORS],
    )
    write_atomic(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def _films(predictions: Mapping[int, list[Example]]) -> list[dict[str, Any]]:
    """Each watched episode with its predictions over time: (caption, grid, cells right) of at most FRAMES steps."""
    steps = list(predictions)
    if len(steps) < 2:
        return []
    chosen = [steps[k] for k in np.unique(np.linspace(0, len(steps) - 1, min(FRAMES, len(steps))).round().astype(int))]
    films: dict[tuple[str, int], dict[str, Any]] = {}
    for step in chosen:
        for example in predictions[step]:
            film = films.setdefault((example.task_id, example.index), {"example": example, "frames": []})
            # the last one sets the scale: at first sizes are anything
            film["example"] = example
            film["frames"].append((f"batch {step}", example.predicted, example.cells_right))
    return list(films.values())


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
        adapted = evaluation.get(f"{name}, adapted")
        if adapted:
            tiles.insert(1, {
                "label": "After training on each task",
                "figure": f"{_count(adapted['pass_at_2'], adapted['scored'])} of {adapted['scored']}",
                "note": f"solved exactly; {_short(adapted.get('seconds_a_task'))} s a task",
            })  # fmt: skip
    steps = len(metrics["step"])
    if not steps:
        return tiles
    last = slice(-_recent(steps), None)
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
    spans = [(f"batches {a + 1} to {b}", slice(a, b), expected) for a, b, expected in COURSE if steps >= b]
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


def _recent(steps: int) -> int:
    """Batches at a run's end that stand for it: 50, or the second half of a short run."""
    return min(50, (steps + 1) // 2)


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
