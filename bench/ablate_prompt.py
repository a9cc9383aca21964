"""Does the prompt matter? Evaluate trained runs with the prompt as it is, shuffled, another task's, and left out.

    python bench/ablate_prompt.py runs/20261122-200000 runs/20261122-210000 ...

Every way answers the same held-out test inputs with the same weights. What stays is the query, its size, and the sizes
that the demonstrations suggest to the size head, so that the difference is what the prompt says and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_fused.arc.episodes import Episode, load_tasks, test_episodes
from qwen_fused.arc.split import divide
from qwen_fused.arc.tasks import Pair
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.qwen.prompt import PromptOutput, QwenPrompt
from qwen_fused.solver.evaluate import evaluate
from qwen_fused.train.saved import load_model


def exchanged(x: Tensor) -> Tensor:
    """Every row replaced by that of the next episode of the batch."""
    return x.roll(1, 0)


def put_together(out: PromptOutput, text: Tensor, control: Tensor) -> PromptOutput:
    return replace(out, text_embedding=text, control=control, prompt=0.5 * text + 0.5 * control)


def shuffled(demonstrations: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
    """Every grid with its cells in another order: the colours stay, and what they draw goes."""
    rng = np.random.default_rng(0)

    def reorder(grid: np.ndarray) -> np.ndarray:
        return rng.permutation(grid.ravel()).reshape(grid.shape)

    # a demonstration has its output
    return [[Pair(reorder(p.input), reorder(p.output)) for p in pairs] for pairs in demonstrations]


def text_of_shuffled(prompt: QwenPrompt, demonstrations: Sequence[Sequence[Pair]], out: PromptOutput) -> PromptOutput:
    # not the module's call, whose hook this is
    return put_together(out, prompt.forward(shuffled(demonstrations)).text_embedding, out.control)


WAYS: dict[str, Callable[[QwenPrompt, Sequence[Sequence[Pair]], PromptOutput], PromptOutput]] = {
    "as it is": lambda prompt, pairs, out: out,
    "text of shuffled cells": text_of_shuffled,
    "text exchanged": lambda prompt, pairs, out: put_together(out, exchanged(out.text_embedding), out.control),
    "control exchanged": lambda prompt, pairs, out: put_together(out, out.text_embedding, exchanged(out.control)),
    "both exchanged": lambda prompt, pairs, out: put_together(
        out, exchanged(out.text_embedding), exchanged(out.control)
    ),
    "both left out": lambda prompt, pairs, out: put_together(
        out, torch.zeros_like(out.text_embedding), torch.zeros_like(out.control)
    ),
}


def figures(model: QwenPlanner, episodes: Sequence[Episode], way: str, batch_size: int) -> tuple[float, float, int]:
    """Cell accuracy, accuracy over the cells that change, and inputs solved in the first attempt."""
    handle = model.prompt.register_forward_hook(lambda module, given, out: WAYS[way](module, given[0], out))
    try:
        result = evaluate(FirstAttempt(model), episodes, batch_size=batch_size)
    finally:
        handle.remove()
    changed = []
    for record, episode in zip(result.records, episodes, strict=True):
        answer, grid = episode.answer, record.attempts[0]
        if answer is not None and grid.shape == answer.shape == episode.query.shape:
            moved = answer != episode.query
            changed.append((grid == answer)[moved].mean() if moved.any() else 1.0)
    solved = sum(record.score.first for record in result.records if record.score)
    # no answer of its query's size: nothing to compare cell by cell
    return result.cell_accuracy, float(statistics.fmean(changed)) if changed else float("nan"), solved


class FirstAttempt:
    """The model's first attempts alone: the second would turn the whole episode, and the prompt with it."""

    def __init__(self, model: QwenPlanner):
        self.model = model

    def predict(self, episodes: Sequence[Episode], attempts: int = 1) -> list:
        return self.model.predict(episodes, attempts=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", choices=["validation", "training"], default="validation")
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for run in arguments.runs:
        model = load_model(run).eval()
        config = model.config
        division = divide(load_tasks(config.dataset).tasks, config.val_fraction, config.split_seed, config.held_out)
        episodes = test_episodes(division.held_out if arguments.split == "validation" else division.training[::4])
        for way, found in rows.items():
            found.append(figures(model, episodes, way, config.batch_size))
    print(f"{arguments.split}, {len(episodes)} test inputs, {len(arguments.runs)} runs (their seeds in order)")
    print(f"{'prompt':23}{'cells':>8}  {'each run':30}{'changed cells':>14}{'solved':>8}")
    for way, found in rows.items():
        cells, changed, solved = zip(*found, strict=True)
        each = " ".join(f"{value:.4f}" for value in cells)
        means = statistics.fmean(cells), statistics.fmean(changed), statistics.fmean(solved)
        print(f"{way:23}{means[0]:8.4f}  {each:30}{means[1]:14.4f}{means[2]:8.1f}")


if __name__ == "__main__":
    main()
