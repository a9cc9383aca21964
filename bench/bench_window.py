"""Training batches in a PromptWindow against a pass through Qwen for every batch.

Both sides run the same batches through the whole model (prompt, policy, agent, loss, backward) and end with the same
Qwen gradient, summed over the batches: it is compared first, and without agreement there is no figure. What differs is
how often Qwen runs. That depends on how many batches use a prompt, so the visits are varied, from the trainer's default
to none returning. Qwen's optimizer step is on neither side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from harness import Call, Comparison, benchmark_one, default_device, refuse
from material import dataset

from qwen_fused.arc.episodes import Episode, collate, load_tasks
from qwen_fused.arc.sampler import EpisodeSampler
from qwen_fused.config import TrainConfig
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.window.prompt_window import PromptWindow

BATCHES = 10
SIDES = {"recompute": "recompute", "retain": "retain", "every batch": None}
LIMIT = 1e-5


def batches_of(visits: int, batch_size: int) -> list[list[Episode]]:
    """The batches of a window as the trainer draws them: each prompt is visited about `visits` times."""
    tasks = load_tasks(dataset()).tasks
    # of few tasks, smaller batches: the window must fit into an epoch
    batch_size = min(batch_size, sum(len(task.train) for task in tasks) // BATCHES)
    sampler = EpisodeSampler(tasks, batch_size=batch_size, seed=0, augment=0.0, window=BATCHES, visits=visits)
    return [sampler.batch(0, number) for number in range(BATCHES)]


class Side:
    """One way to run the batches; `mode` None asks Qwen at every batch."""

    def __init__(self, model: QwenPlanner, mode: str | None, batches: list[list[Episode]], device: torch.device):
        self.model, self.mode, self.batches, self.device = model, mode, batches, device

    def run(self) -> list[torch.Tensor]:
        """Qwen's gradient, summed over the batches."""
        self.model.zero_grad(set_to_none=True)
        prompt, hook = self.model.prompt, None
        if self.mode:
            window = PromptWindow(prompt.pooled, len(self.batches), mode=self.mode)
            hook = prompt.register_forward_pre_hook(lambda module, args: (args[0], window.prompts(args[0])))
        for number, episodes in enumerate(self.batches):
            torch.manual_seed(number)
            self.model(collate(episodes).to(self.device), epoch=1).loss.backward()
        if hook:
            window.flush()
            hook.remove()
        return [p.grad for p in prompt.backbone.parameters() if p.requires_grad]


def relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Norm of the difference over all tensors, relative to the norm of `want`."""
    difference = torch.stack([(g - w).norm() for g, w in zip(got, want, strict=True)]).norm()
    return float(difference / torch.stack([w.norm() for w in want]).norm())


def compare(
    model: QwenPlanner, name: str, visits: int, batch_size: int, device: torch.device, bench: str = "window"
) -> Comparison:
    """Both modes of the window and the pass at every batch, with prompts that are visited `visits` times."""
    batches = batches_of(visits, batch_size)
    sides = {side: Side(model, mode, batches, device) for side, mode in SIDES.items()}

    @functools.cache
    def errors() -> dict[str, float]:
        want = [g.clone() for g in sides["every batch"].run()]
        return {side: relative_error(sides[side].run(), want) for side, mode in SIDES.items() if mode}

    def check(side: str) -> float | None:
        return refuse(f"the window's gradient ({side})", errors()[side], LIMIT) if SIDES[side] else None

    uses = sum(map(len, batches))
    prompts = len({episode.demonstrations for episodes in batches for episode in episodes})
    return Comparison(
        bench=bench,
        case=f"{name}, {BATCHES} batches, {uses} episodes of {prompts} prompts",
        calls={side: Call(lambda _, s=s: s.run()) for side, s in sides.items()},
        ours=TrainConfig().window_mode,
        device=device,
        check=check,
        episodes=uses,
    )


def planner(qwen: str, max_prompt_tokens: int, device: torch.device) -> QwenPlanner:
    config = TrainConfig(qwen=qwen, max_prompt_tokens=max_prompt_tokens)
    return QwenPlanner(config).to(device).train()


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    """What the suite measures: the tiny Qwen, with prompts that return and, at length, with none that does."""
    model, visits = planner("tiny", 512, device), TrainConfig().prompt_visits
    if level == "quick":
        yield compare(model, "tiny", visits, 16 if device.type == "cuda" else 4, device)
        return
    for visited in (visits, 1):
        yield compare(model, "tiny", visited, 16, device)


@pytest.fixture(scope="module")
def tiny() -> Comparison:
    return compare(planner("tiny", 512, default_device()), "tiny", 4, 4, default_device())


@pytest.mark.parametrize("side", SIDES)
def test_window(benchmark, tiny, side: str) -> None:
    benchmark_one(benchmark, tiny, side)
