"""The window's gradient is the uncached one, whatever encode does at random, and resuming inside it is bitwise."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from qwens import exact_norms, save_qwen  # noqa: F401
from torch import Tensor

from qwen_fused.arc.episodes import Pair
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.window.prompt_window import PromptWindow

DROPOUT = 0.3
# relative error of the whole gradient, and of any one tensor, which may be small beside the rest
LIMITS = {torch.float32: (1e-5, 2e-4), torch.float64: (1e-12, 1e-10)}


def demonstrations(seed: int) -> tuple[Pair, ...]:
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, 5, (int(rng.integers(1, 3)), 4))
    return tuple(
        Pair(rng.integers(0, 10, (a, b), dtype=np.uint8), rng.integers(0, 10, (c, d), dtype=np.uint8))
        for a, b, c, d in shapes
    )


TASKS = [demonstrations(seed) for seed in range(9)]
# keys return in later batches, twice in one batch, and some batches bring nothing new
BATCHES = [[0, 1, 2], [2, 3, 0, 3], [1, 0, 2], [4, 5, 1], [5, 4, 4], [6, 0, 8], [7, 8]]

KINDS = {
    "qwen2": ({}, {}),
    "dropout": (dict(attention_dropout=DROPOUT), {}),
    "lora": (dict(attention_dropout=DROPOUT), dict(lora_rank=2)),
    "checkpointing": (dict(attention_dropout=DROPOUT), dict(gradient_checkpointing=True)),
    "attention": ({}, dict(pooling="attention")),
    "lora, checkpointing": (dict(attention_dropout=DROPOUT), dict(lora_rank=2, gradient_checkpointing=True)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind, (changes, _) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp("qwen")
        save_qwen(made[kind], "qwen3" if kind == "dropout" else "qwen2.5", **changes)
    return made


def make(folders, kind: str, dtype: torch.dtype = torch.float32) -> QwenPrompt:
    prompt = QwenPrompt(str(folders[kind]), dim=8, dtype=dtype, **KINDS[kind][1])
    return prompt.double() if dtype == torch.float64 else prompt


def trained(prompt: QwenPrompt) -> list[torch.nn.Parameter]:
    """Qwen's parameters, or the adapters alone, and the pooling's."""
    queries = list(prompt.queries.parameters()) if prompt.queries else []
    return [p for p in prompt.backbone.parameters() if p.requires_grad] + queries


class Run:
    """A small training loop: Qwen steps once per window, a head at every batch, gradients of each window kept."""

    def __init__(self, prompt: QwenPrompt, autocast: bool = False):
        self.prompt = prompt
        self.forward = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=autocast)
        # gradients here have norms of hundreds; a larger step would amplify rounding from window to window
        self.qwen = torch.optim.SGD(trained(prompt), lr=1e-4)
        dtype = prompt.projection[0].weight.dtype
        width = prompt.projection[0].in_features
        self.head = 0.3 * torch.sin(torch.arange(5 * width, dtype=dtype)).view(5, width)
        self.head.requires_grad_()
        self.gradients: list[list[Tensor]] = []
        self.losses: list[Tensor] = []
        torch.manual_seed(5)

    def backward(self, pooled: Tensor, batch: list[int], scale: float = 1.0) -> None:
        """A loss that is not linear in the prompts, differs from batch to batch and steps its own weights."""
        with self.forward():
            out = self.prompt([TASKS[k] for k in batch], pooled).text_embedding
            # one number of the stream, so that the random state moves between batches as an agent's would
            noise = torch.rand((), dtype=out.dtype)
            loss = (torch.tanh(pooled @ self.head.T).square().sum() + (out * noise).cos().sum()) * scale
        loss.backward()
        self.losses.append(loss.detach() / scale)
        with torch.no_grad():
            self.head -= 0.01 * self.head.grad / scale
            self.head.grad = None

    def step(self) -> None:
        self.gradients.append([p.grad.clone() for p in trained(self.prompt)])
        self.qwen.step()
        self.qwen.zero_grad()


def run_window(prompt: QwenPrompt, size: int, mode: str, batches=BATCHES, autocast: bool = False) -> Run:
    run = Run(prompt, autocast)
    window = PromptWindow(lambda keys: prompt.pooled([TASKS[k] for k in keys]), size, mode=mode)
    for number, batch in enumerate(batches, start=1):
        with run.forward():
            prompts = window.prompts(batch)
        run.backward(prompts, batch)
        if window.full or number == len(batches):
            window.flush()
            run.step()
    return run


def run_uncached(prompt: QwenPrompt, size: int, batches=BATCHES, autocast: bool = False) -> Run:
    """Every batch through Qwen with its own graph; dropout falls for a key as at its first use in the window."""
    run = Run(prompt, autocast)
    calls: list[tuple[list[int], Tensor]] = []
    for number, batch in enumerate(batches, start=1):
        new = list(dict.fromkeys(k for k in batch if not any(k in keys for keys, _ in calls)))
        if new:
            calls.append((new, torch.get_rng_state()))
            prompt.pooled([TASKS[k] for k in new])
        after = torch.get_rng_state()
        table = {}
        for keys, state in calls:
            torch.set_rng_state(state)
            with run.forward():
                table.update(zip(keys, prompt.pooled([TASKS[k] for k in keys]), strict=True))
        torch.set_rng_state(after)
        run.backward(torch.stack([table[k] for k in batch]), batch)
        if number % size == 0 or number == len(batches):
            run.step()
            calls.clear()
    return run


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    difference = sum(float((g - w).detach().double().square().sum()) for g, w in zip(got, want, strict=True))
    return (difference / sum(float(w.detach().double().square().sum()) for w in want)) ** 0.5


@pytest.mark.parametrize("mode", ["recompute", "retain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_gradient_equals_the_uncached_one(dtype, kind, mode, folders, exact_norms):  # noqa: F811
    # windows of 3, 3 and an uneven last one of 1, Qwen moving between them
    want = run_uncached(make(folders, kind, dtype), 3)
    got = run_window(make(folders, kind, dtype), 3, mode)
    whole, single = LIMITS[dtype]
    assert len(got.gradients) == len(want.gradients) == 3
    for g, w in zip(got.gradients, want.gradients, strict=True):
        assert relative_error(g, w) < whole
        assert max(relative_error([a], [b]) for a, b in zip(g, w, strict=True)) < single
    assert relative_error(got.losses, want.losses) < whole
    assert relative_error(list(got.prompt.parameters()), list(want.prompt.parameters())) < whole


@pytest.mark.parametrize("kind", ["dropout", "lora, checkpointing"])
def test_gradient_under_autocast(kind, folders):
    """bfloat16 rounds each backward pass, of a batch or of a window: equal to its rounding, 2^-8, and between modes."""
    exact = run_uncached(make(folders, kind), 3)
    want = run_uncached(make(folders, kind), 3, autocast=True)
    got, retained = (run_window(make(folders, kind), 3, mode, autocast=True) for mode in ("recompute", "retain"))
    assert relative_error(want.gradients[0], exact.gradients[0]) > 1e-3, "bfloat16 is at work"
    assert relative_error(got.gradients[0], want.gradients[0]) < 2**-8
    for g, r, w in zip(got.gradients, retained.gradients, want.gradients, strict=True):
        # from the second window on the weights are no longer the same either
        assert relative_error(g, w) < 0.03
        assert all(map(torch.equal, g, r))


def test_a_window_inside_one_autocast_block(folders):
    """What the first pass, without a graph, leaves in autocast's cache of weights must not reach the second."""
    gradients = []
    for mode in ("recompute", "retain"):
        prompt = make(folders, "qwen2")
        window = PromptWindow(lambda keys, prompt=prompt: prompt.pooled([TASKS[k] for k in keys]), 3, mode=mode)
        # the first window of all keeps its graph in both modes
        for _ in range(2):
            prompt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for batch in BATCHES[:3]:
                    window.prompts(batch).tanh().square().sum().backward()
                window.flush()
        gradients.append([p.grad for p in trained(prompt)])
    assert all(map(torch.equal, *gradients))


def test_gradient_equals_plain_batches_without_a_window(folders, exact_norms):  # noqa: F811
    """No dropout, no window's calls: each batch as one call on all its keys."""
    prompt = make(folders, "qwen2", torch.float64)
    run = Run(prompt)
    for batch in BATCHES:
        run.backward(prompt.pooled([TASKS[k] for k in batch]), batch)
    run.step()
    got = run_window(make(folders, "qwen2", torch.float64), 10, "recompute")
    assert relative_error(got.gradients[0], run.gradients[0]) < 1e-12


def test_dropout_is_active(folders):
    """What the tests above call dropout changes the gradient when its masks fall otherwise."""
    one, other = Run(make(folders, "dropout")), Run(make(folders, "dropout"))
    torch.manual_seed(1)
    one.backward(one.prompt.pooled([TASKS[0]]), [0])
    torch.manual_seed(2)
    other.backward(other.prompt.pooled([TASKS[0]]), [0])
    one.step()
    other.step()
    assert relative_error(one.gradients[0], other.gradients[0]) > 0.05


def test_modes_agree_and_leave_the_same_random_state(folders):
    runs = []
    for mode in ("recompute", "retain"):
        runs.append(run_window(make(folders, "dropout"), 3, mode))
        runs[-1].state = torch.get_rng_state()
    assert torch.equal(runs[0].state, runs[1].state)
    assert relative_error(runs[0].gradients[2], runs[1].gradients[2]) < 1e-6


def test_a_window_of_one_is_plain_training(folders):
    assert (
        relative_error(
            sum(run_window(make(folders, "dropout"), 1, "recompute").gradients, []),
            sum(run_uncached(make(folders, "dropout"), 1).gradients, []),
        )
        < 1e-5
    )


def reload(state: dict) -> dict:
    """Through a file, without pickle execution."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", ["recompute", "retain"])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_inside_a_window_is_bitwise(mode, done, folders):
    batches = BATCHES[:4]

    def encoder(prompt):
        return lambda keys: prompt.pooled([TASKS[k] for k in keys])

    straight = Run(make(folders, "dropout"))
    window = PromptWindow(encoder(straight.prompt), 4, mode=mode)
    saved = None
    for number, batch in enumerate(batches):
        if number == done:
            saved = reload(
                {
                    "window": window.state_dict(),
                    "model": straight.prompt.state_dict(),
                    "head": straight.head.detach(),
                    "rng": torch.get_rng_state(),
                }
            )
        straight.backward(window.prompts(batch), batch)
    window.flush()
    straight.step()

    resumed = Run(make(folders, "dropout"))
    resumed.prompt.load_state_dict(saved["model"])
    resumed.head = saved["head"].requires_grad_()
    torch.set_rng_state(saved["rng"])
    window = PromptWindow(encoder(resumed.prompt), 4, mode=mode)
    window.load_state_dict(saved["window"], keys=[key for batch in batches[:done] for key in batch])
    for batch in batches[done:]:
        resumed.backward(window.prompts(batch), batch)
    window.flush()
    resumed.step()
    assert resumed.losses == straight.losses[done:]
    for got, want in zip(resumed.gradients[0], straight.gradients[0], strict=True):
        assert torch.equal(got, want)
