"""Episodes per second of the whole training step: a prompt window of ten, of one, and a naive recipe.

Both windows are the trainer's own loop over the same batches and do the same work in it, but for Qwen's part, which is
what a window saves: one pass for each prompt, one backward pass and one step in ten batches instead of in each.

The naive recipe is what a first version of such a trainer looks like: one episode at a time on a fixed 30 x 30 canvas,
Qwen at every one, the loss in plain torch, a host read of every parameter's norm, unfused AdamW. "one at a time" is the
same on a canvas cut to its episode. Data, model, weights and what is computed are the same, and ours is compared with
the naive loss and gradient first.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_window import BATCHES, batches_of, relative_error
from harness import Call, Comparison, benchmark_one, default_device, refuse
from material import dataset

from qwen_fused.arc.episodes import MAX_SIDE, Episode, collate
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.train.trainer import Trainer

# float32 through Qwen, a recurrent planner and two losses that add up in different orders
LIMIT = 1e-4


class Steps:
    """The trainer's own loop over the batches, Qwen's pass every `window` of them."""

    def __init__(self, config: TrainConfig, batches: list[list[Episode]], folder: Path):
        self.trainer = Trainer(config, folder)
        self.batches, self.window = batches, config.prompt_window

    def run(self) -> None:
        pending = None
        for number, episodes in enumerate(self.batches):
            running = self.trainer.train_step(episodes, 1, flush=(number + 1) % self.window == 0)
            if pending is not None:
                self.trainer.read(pending)
            pending = running
        self.trainer.read(pending)


class Naive:
    """A loop over single episodes; `canvas` None cuts it to the episode."""

    def __init__(self, config: TrainConfig, episodes: list[Episode], canvas: tuple[int, int] | None, device):
        self.model, self.episodes, self.canvas, self.device = planner(config, device), episodes, canvas, device
        self.groups = [[p for _, p in group] for group in self.model.groups().values()]
        self.optimizer = torch.optim.AdamW([{"params": group} for group in self.groups], lr=1e-4)
        self.log: list[float] = []

    def run(self) -> None:
        for episode in self.episodes:
            out = self.model(collate([episode], canvas=self.canvas).to(self.device), epoch=1)
            self.optimizer.zero_grad()
            out.loss.backward()
            for group in self.groups:
                norm = sum(p.grad.norm().item() ** 2 for p in group if p.grad is not None) ** 0.5
                torch.nn.utils.clip_grad_norm_(group, 1.0)
                self.log.append(norm)
            self.optimizer.step()
            self.log += [out.loss.item(), out.reward.mean().item(), out.score.efe.accuracy.mean().item()]
        self.log.clear()


def planner(config: TrainConfig, device: torch.device) -> QwenPlanner:
    torch.manual_seed(config.seed)
    return QwenPlanner(config).to(device).train()


def loss_and_gradient(config: TrainConfig, episode: Episode, device: torch.device) -> list[torch.Tensor]:
    """Loss of one episode and its gradient, all of it, from the same weights and noise."""
    model = planner(config, device)
    batch = collate([episode]).to(device)
    torch.manual_seed(0)
    loss = model(batch, epoch=1).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def compare(device: torch.device, batch_size: int, naive_episodes: int, folder: Path) -> Comparison:
    """All ways to train on the same episodes."""

    def config(**changes) -> TrainConfig:
        shared = dict(dataset=dataset(), batch_size=batch_size, device=str(device), prove=False, out=folder)
        return TrainConfig(**{**shared, **changes})

    batches = batches_of(TrainConfig().prompt_visits, batch_size)
    # spread over the batches, as these hold episodes of one size each
    every = [episode for batch in batches for episode in batch]
    some = every[:: len(every) // naive_episodes][:naive_episodes]
    plain = config(prompt_window=1, backend="reference")
    runs = {
        "window 10": Steps(config(prompt_window=BATCHES), batches, folder).run,
        "window 1": Steps(config(prompt_window=1), batches, folder).run,
        "one at a time": Naive(plain, some, None, device).run,
        "naive": Naive(plain, some, (MAX_SIDE, MAX_SIDE), device).run,
    }
    share = len(some) / len(every)

    @functools.cache
    def error() -> float:
        want = loss_and_gradient(plain, some[0], device)
        return relative_error(loss_and_gradient(config(), some[0], device), want)

    def check(name: str) -> float | None:
        return refuse("the training step", error(), LIMIT) if name.startswith("window") else None

    return Comparison(
        bench="step",
        case=f"tiny, {BATCHES} batches of {len(batches[0])}",
        calls={
            name: Call(lambda _, run=run: run(), share=1.0 if name.startswith("window") else share)
            for name, run in runs.items()
        },
        ours="window 10",
        device=device,
        check=check,
        episodes=len(every),
    )


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    """What the suite measures."""
    with tempfile.TemporaryDirectory() as folder:
        quick = level == "quick" and device.type == "cpu"
        yield compare(device, *((4, 4) if quick else (16, 16)), Path(folder))


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Comparison:
    return compare(default_device(), 4, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("who", ["window 10", "window 1", "one at a time", "naive"])
def test_step(benchmark, steps, who: str) -> None:
    benchmark_one(benchmark, steps, who)
