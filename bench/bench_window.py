"""Training batches in a PromptWindow against a pass through Qwen for every batch.

Both sides run the same batches through the whole model (prompt, policy, agent, loss, backward) and end with the same
Qwen gradient, summed over the batches: it is compared first, and without agreement there is no figure. What differs is
how often Qwen runs. That depends on how many batches use a prompt, so the number of different prompts is varied, from
every batch asking for the same ones to none returning. Qwen's optimizer step is on neither side.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import Call, Comparison, benchmark_one, default_device, refuse
from material import HALF_BILLION, dataset, save_qwen

from qwen_fused.config import TrainConfig
from qwen_fused.data import Episode, collate, load_tasks
from qwen_fused.model import QwenPlanner
from qwen_fused.window import PromptWindow

BATCHES = 10
SIDES = {"recompute": "recompute", "retain": "retain", "every batch": None}
LIMIT = 1e-5


def batches_of(prompts: int, batch_size: int) -> list[list[Episode]]:
    """Episodes whose demonstrations come from `prompts` different sets, used in turn, with queries that vary."""
    tasks = [task for task in load_tasks(dataset()).tasks if len(task.train) >= 3]
    # a set shows all pairs but two, which ask; where there are fewer tasks than prompts, other pairs of a task ask
    sets = [(task, turn) for turn in range(-(-prompts // len(tasks))) for task in tasks]
    sets = sets[:: len(sets) // prompts][:prompts]
    episodes = []
    for use in range(BATCHES * batch_size):
        task, turn = sets[use % prompts]
        order = task.train[turn % len(task.train) :] + task.train[: turn % len(task.train)]
        shown, asks = order[: max(len(order) - 2, 1)], order[max(len(order) - 2, 1) :]
        pair = asks[(use // prompts) % len(asks)]
        episodes.append(Episode(task.id, _same(shown), pair.input, pair.output, use % prompts))
    return [episodes[start : start + batch_size] for start in range(0, len(episodes), batch_size)]


_same = functools.lru_cache(maxsize=None)(lambda shown: shown)


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
        return [p.grad for p in prompt.qwen_parameters()]


def relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Norm of the difference over all tensors, relative to the norm of `want`."""
    difference = torch.stack([(g - w).norm() for g, w in zip(got, want, strict=True)]).norm()
    return float(difference / torch.stack([w.norm() for w in want]).norm())


def compare(
    model: QwenPlanner, name: str, prompts: int, batch_size: int, device: torch.device
) -> Comparison:
    """Both modes of the window and the pass at every batch, for `prompts` different prompts."""
    batches = batches_of(prompts, batch_size)
    sides = {side: Side(model, mode, batches, device) for side, mode in SIDES.items()}

    @functools.cache
    def errors() -> dict[str, float]:
        want = [g.clone() for g in sides["every batch"].run()]
        return {side: relative_error(sides[side].run(), want) for side, mode in SIDES.items() if mode}

    def check(side: str) -> float | None:
        return refuse(f"the window's gradient ({side})", errors()[side], LIMIT) if SIDES[side] else None

    uses = BATCHES * batch_size
    return Comparison(
        bench="window",
        case=f"{name}, {prompts} prompts for {uses} episodes in {BATCHES} batches",
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
    """What the suite measures: the tiny Qwen, and Qwen2.5-0.5B's true shape under short prompts."""
    model = planner("tiny", 512, device)
    if level == "quick" and device.type == "cpu":
        yield compare(model, "tiny", 10, 4, device)
        return
    for prompts in (16, 40, 160):
        yield compare(model, "tiny", prompts, 16, device)
    del model
    batch_size, tokens = (16, 256) if device.type == "cuda" else (2, 48)
    with tempfile.TemporaryDirectory() as folder:
        model = planner(save_qwen(Path(folder), HALF_BILLION), tokens, device)
    yield compare(model, f"Qwen2.5-0.5B's shape, {tokens} tokens", 4 * batch_size, batch_size, device)


@pytest.fixture(scope="module")
def tiny() -> Comparison:
    return compare(planner("tiny", 512, default_device()), "tiny", 8, 4, default_device())


@pytest.mark.parametrize("side", SIDES)
def test_window(benchmark, tiny, side: str) -> None:
    benchmark_one(benchmark, tiny, side)
