"""The training step on a CUDA device: nothing waits, nothing leaks, autocast and the scaler do their work.

Every body runs on the CPU too, see devices.py.
"""

from __future__ import annotations

import pytest
import torch
from devices import in_use, no_sync, record, repeats
from torch import Tensor

from qwen_fused.arc.episodes import collate
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.train.pending import SCALARS, PendingBatch
from qwen_fused.train.trainer import Trainer


@pytest.fixture
def make(small_config, tmp_path, device: torch.device):
    """Settings -> a trainer on the device."""

    def trainer(**changes) -> Trainer:
        return Trainer(small_config(device=str(device), **changes), tmp_path)

    return trainer


def next_batch(trainer: Trainer) -> PendingBatch:
    epoch, index = divmod(trainer.progress.step, trainer.sampler.batches_per_epoch())
    return trainer.train_step(trainer.sampler.batch(epoch, index), epoch, flush=trainer.sampler.ends_window(index))


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(make, device: torch.device, precision: str, window: int) -> None:
    trainer = make(precision=precision, prompt_window=window)
    # kernels are compiled and generators made at the first ones
    for _ in range(2):
        trainer.read(next_batch(trainer))
    with no_sync(device):
        pending = [next_batch(trainer) for _ in range(2)]
    rows = [trainer.read(batch) for batch in pending]
    assert [row["step"] for row in rows] == [3, 4]
    assert all(row["loss"] == row["loss"] and row["qwen_grad"] > 0 and row["agent_grad"] > 0 for row in rows)


def test_learns_one_batch(make, device: torch.device) -> None:
    trainer = make(warmup_batches=1, agent_lr=1e-2, prompt_window=1)
    episodes = trainer.sampler.batch(0, 0)
    losses = [trainer.read(trainer.train_step(episodes, 1))["efe"] for _ in range(30 if device.type == "cuda" else 12)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_runs_the_plan_narrow_and_keeps_the_gradient(make, precision: str) -> None:
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    rows = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        trainer, kinds = make(precision=name), set()
        trainer.model.agent.encode.register_forward_hook(lambda m, i, o, kinds=kinds: kinds.add(o.dtype))
        torch.manual_seed(0)
        rows[name] = trainer.read(next_batch(trainer))
        assert kinds == {torch.float32 if name == "fp32" else narrow}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    # the norms are those of the true gradient, whatever the scale: half precision moves them a little
    for key in ("loss", "qwen_grad", "prompt_grad", "agent_grad"):
        assert rows[precision][key] == pytest.approx(rows["fp32"][key], rel=0.1), key


def test_scaler_skips_a_planted_overflow_and_goes_on(make) -> None:
    trainer = make(precision="fp16")
    trainer.read(next_batch(trainer))
    name, parameter = trainer.groups["qwen"][-1]
    handle = parameter.register_hook(lambda grad: grad * float("inf"))
    before, scale = weights(trainer), trainer.scaler.get_scale()
    row = trainer.read(next_batch(trainer))
    assert row["nonfinite"] == 1 and trainer.scaler.get_scale() < scale, name
    assert all(map(torch.equal, weights(trainer), before))
    handle.remove()
    row = trainer.read(next_batch(trainer))
    assert row["nonfinite"] == 1
    assert not all(map(torch.equal, weights(trainer), before))


def test_leaks_nothing(make, device: torch.device) -> None:
    trainer = make(prompt_window=2, augment=0.0)
    episodes = trainer.sampler.batch(0, 0)

    def window() -> None:
        for flush in (False, True):
            trainer.read(trainer.train_step(episodes, 1, flush=flush))

    for _ in range(2):
        window()
    before = in_use(device)
    for _ in range(repeats(device) // 2 + 1):
        window()
    assert in_use(device) == before


def test_graph_of_forward_and_backward(make, device: torch.device, monkeypatch) -> None:
    """All that follows Qwen's prompt, which is made on the host: policy, plans, loss, and the gradient back to it."""
    trainer = make()
    batch = collate(trainer.sampler.batch(0, 0)).to(device)
    with torch.no_grad():
        encoded = trainer.model.prompt([episode.demonstrations for episode in batch.episodes])
    encoded.prompt.requires_grad_()
    monkeypatch.setattr(QwenPrompt, "forward", lambda self, demonstrations, pooled=None: encoded)
    noise = torch.randn(len(batch.episodes), trainer.config.prompt_dim, device=device)
    parameter = trainer.model.agent.core.mix

    def body() -> tuple[Tensor, ...]:
        encoded.prompt.grad = None
        for p in trainer.model.parameters():
            p.grad = None
        out = trainer.model(batch, epoch=1, noise=noise)
        out.loss.backward()
        return out.loss.detach(), encoded.prompt.grad, parameter.grad

    expected = [[x.clone() for x in body()]]
    fresh = torch.randn_like(encoded.prompt)
    with torch.no_grad():
        kept = encoded.prompt.clone()
        encoded.prompt.copy_(fresh)
    expected.append([x.clone() for x in body()])
    found, replay = record(device, body)
    for prompt, values in zip((kept, fresh), expected, strict=True):
        with torch.no_grad():
            encoded.prompt.copy_(prompt)
        replay()
        for ours, theirs in zip(found, values, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_every_figure_of_a_step_is_made_on_the_device(make, device: torch.device) -> None:
    trainer = make()
    pending = next_batch(trainer)
    assert pending.values.shape == (len(SCALARS),) and pending.stats.stats.values.device.type == device.type
    assert {p.device.type for p in trainer.model.parameters()} == {device.type}
    assert {value.device.type for state in trainer.optimizer.state.values() for value in state.values()} == {
        device.type
    }
