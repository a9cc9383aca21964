"""What each part of the recipe is worth: the default run with one thing changed, each trained and evaluated alike.

    python bench/ablate_training.py --epochs 5                          # all of them, one after the other
    python bench/ablate_training.py --only default "window 1" --seed 1

Prints a row a run: held-out cells and inputs solved, unseen pairs of training tasks, mean mask ratio and reward of the
last hundred batches. Differences of one run are within noise unless they are large: say so where you quote them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from qwen_fused.config import TrainConfig
from qwen_fused.qwen.prompt import PromptOutput, QwenPrompt
from qwen_fused.qwen.tiny import SHAPE
from qwen_fused.train.loop import train

WEIGHTS = TrainConfig().weights
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "window 1": {"prompt_window": 1},
    "prompt exchanged": {},
    "prompt left out": {},
    "policy off": {"delta_scale": 1e-6, "objective_share": 1.0},
    "policy at the recipe's rate": {"policy_lr": 5e-5},
    "risk 0": {"weights": replace(WEIGHTS, risk=0.0)},
    "risk 1": {"weights": replace(WEIGHTS, risk=1.0)},
    "ambiguity 0.1": {"weights": replace(WEIGHTS, ambiguity=0.1)},
    "agreement 0": {"weights": replace(WEIGHTS, agreement=0.0)},
    "anchor 0": {"weights": replace(WEIGHTS, anchor=0.0)},
    "prompt term 0": {"weights": replace(WEIGHTS, prompt=0.0)},
    "reversibility 0": {"reversibility": 0.0},
    "hard cells": {"hard_mode": "cell", "hard_floor": 0.2},
    "T = 5": {"plan_steps": 5},
    "T = 8": {"plan_steps": 8},
    "no augmentation": {"augment": 0.0},
    "all augmented": {"augment": 1.0},
    "Qwen 2 x 128": {},
    "Qwen 6 x 256": {},
}


def exchange(x: Tensor) -> Tensor:
    """Each row the next episode's."""
    return x.roll(1, 0)


PROMPTS: dict[str, Callable[[Tensor], Tensor]] = {
    "prompt exchanged": exchange,
    # a product, so that the graph to Qwen is there, with a gradient of zero
    "prompt left out": lambda x: 0.0 * x,
}

QWENS: dict[str, dict[str, int]] = {
    "Qwen 2 x 128": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=384),
    "Qwen 6 x 256": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768),
}


@contextmanager
def changed(name: str) -> Iterator[None]:
    """While it lasts, what no setting changes: prompts that are another's or nothing, evaluated too; Qwen's size."""
    forward = QwenPrompt.forward

    def spoiled(module: QwenPrompt, *args: Any, **options: Any) -> PromptOutput:
        out = forward(module, *args, **options)
        parts = ("prompt", "text_embedding", "control")
        return replace(out, **{part: PROMPTS[name](getattr(out, part)) for part in parts})

    made = spoiled if name in PROMPTS else forward
    with patch.object(QwenPrompt, "forward", made), patch.dict(SHAPE, QWENS.get(name, {})):
        yield


def row_of(name: str, folder: Path, seconds: float) -> str:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-100:]
    mean = {key: statistics.fmean(row[key] for row in metrics) for key in ("mask_ratio", "reward")}
    held_out, training = evaluation["validation"], evaluation["training"]
    return (
        f"{name:28}{held_out['cell_accuracy']:8.4f}{held_out['pass_at_2'] * held_out['scored']:8.0f}"
        f"{training['cell_accuracy']:10.4f}{training['pass_at_2'] * training['scored']:8.0f}"
        f"{mean['mask_ratio']:9.4f}{mean['reward']:9.4f}{seconds / 60:8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    arguments = parser.parse_args()
    rows = [f"{'':28}{'held-out':>8}{'solved':>8}{'training':>10}{'solved':>8}{'mask':>9}{'reward':>9}{'minutes':>8}"]
    for name in arguments.only:
        config = TrainConfig(
            **CHANGES[name], out=arguments.out / name.replace(" ", "-"), seed=arguments.seed, prove=False, eval_every=0,
            epochs=arguments.epochs, checkpoint_every=10**6, log_every=74,
        )  # fmt: skip
        started = time.monotonic()
        with changed(name):
            folder = train(config)
        rows.append(row_of(name, folder, time.monotonic() - started))
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
