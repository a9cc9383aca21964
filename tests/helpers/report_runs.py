"""A run folder whose figures are known, for the tests of its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from qwen_fused.arc.episodes import test_episodes
from qwen_fused.report.answers import Example, plain_examples, write_examples
from qwen_fused.report.pick_examples import watched_episodes, watched_examples
from qwen_fused.solver.evaluate import evaluate


def metrics_row(step: int, per_epoch: int = 50) -> dict:
    """A run whose figures are known in closed form: the loss falls by 0.01 a batch from 5."""
    return {
        "step": step,
        "epoch": (step - 1) // per_epoch,
        "loss": 5 - 0.01 * step,
        "efe": 4 - 0.01 * step,
        "size_loss": 1.0,
        "policy_loss": 0.1,
        "reward": 0.25,
        "qwen_grad": 0.0 if step == 1 else 2e-5,
        "prompt_grad": 1e-3,
        "agent_grad": 1.0,
        "policy_grad": 1e-2,
        "mask_ratio": 0.5,
        "accuracy": 0.5,
        "solved": 0.0,
        "size_accuracy": 0.75,
        "truncated": 0.0,
        "nonfinite": 0,
        "lr_qwen": 1e-4,
        "lr_agent": 1e-3,
        "episodes_per_second": 12.5,
    }


class AnswersFirst:
    """Knows every third answer and hands back the query for the others."""

    def __init__(self, episodes):
        self.answers = {(e.task_id, e.index): e.answer for e in episodes[::3]}

    def predict(self, episodes, attempts=2):
        return [[self.answers.get((e.task_id, e.index), e.query)] for e in episodes]


def make_run(folder: Path, tasks, *, batches: int = 120, evaluated: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"qwen": "tiny", "dataset": "arc1", "seed": 3, "batch_size": 16, "precision": "fp32"})
    )
    rows = "".join(json.dumps(metrics_row(step)) + "\n" for step in range(1, batches + 1))
    (folder / "metrics.jsonl").write_text(rows)
    if evaluated:
        episodes = test_episodes(tasks)
        result = evaluate(AnswersFirst(episodes), episodes)
        (folder / "evaluation.json").write_text(json.dumps({"validation": result.to_dict()}))
        write_examples(folder / "examples.json", [example(e, result.records[k]) for k, e in enumerate(episodes[:12])])
        watched = watched_episodes(tasks)
        # at first everything is answered by the query
        first = [replace(e, predicted=e.input) for e in watched_examples(watched, result)]
        rows = [(0, first)] + [(step, watched_examples(watched, result)) for step in (50, 100)]
        lines = [{"step": step, "examples": plain_examples(shown, "x")} for step, shown in rows]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = range(10, batches + 1, 10)
    norms = [{"step": s, "norms": {"layer 0": 1 / s, "layer 1": 2 / s, "other": 0.0}} for s in steps]
    (folder / "gradients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in norms))
    return folder


def example(episode, record) -> Example:
    return Example(
        task_id=episode.task_id,
        index=episode.index,
        input=episode.query,
        target=episode.answer,
        predicted=record.attempts[0],
        plan=(record.attempts[0],) * 5,
        backward=(episode.query,) + (episode.answer,) * 5,
        why="nearest" if record.score.any else "hardest",
        demonstrations=tuple((pair.input, pair.output) for pair in episode.demonstrations),
    )
