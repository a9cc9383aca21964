"""One step of training: what each group gets, what the window adds up, what is clipped, and what a bad gradient does.

Autocast, the scaler and a whole batch learnt are test_trainer_cuda.py's, on every device.
"""

from __future__ import annotations

import pytest
import torch

from qwen_fused.train.trainer import Trainer, TrainingStopped


@pytest.fixture
def trainer(small_config, tmp_path) -> Trainer:
    return Trainer(small_config(), tmp_path)


def one_batch(trainer: Trainer) -> dict:
    step = trainer.progress.step
    epoch, index = divmod(step, trainer.sampler.batches_per_epoch())
    return trainer.read(trainer.train_step(trainer.sampler.batch(epoch, index), epoch))


@pytest.mark.parametrize("mode", ["recompute", "retain"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_window_gives_qwen_the_mean_gradient_of_its_batches(small_config, tmp_path, mode, precision):
    config = small_config(prompt_window=4, prompt_visits=2, window_mode=mode, precision=precision)
    cached, direct = Trainer(config, tmp_path / "a"), Trainer(config, tmp_path / "b")
    means = [torch.zeros_like(p) for _, p in direct.groups["qwen"]]
    clip = direct.norms.clip_

    def collect(stats, limit):
        # as a loop without a window would: each batch's own gradient, and no step of Qwen until the fourth
        for mean, (_, p) in zip(means, direct.groups["qwen"], strict=True):
            mean += p.grad / 4
            p.grad = None
        clip(stats, limit)

    def forward(batch, *, epoch, part, pooled):
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            out = direct.model(batch, epoch=epoch)
        return out, pooled

    direct.prompts = lambda batch: torch.zeros(())
    direct.norms.clip_, direct.forward, direct.window.flush = collect, forward, lambda scale: None
    clip_cached, got = cached.norms.clip_, []

    def look(stats, limit):
        got[:] = [None if p.grad is None else p.grad.clone() for _, p in cached.groups["qwen"]]
        clip_cached(stats, limit)

    cached.norms.clip_ = look
    for index in range(4):
        episodes = cached.sampler.batch(0, index)
        for trainer, flush in ((cached, index == 3), (direct, True)):
            torch.manual_seed(index)
            row = trainer.read(trainer.train_step(episodes, 0, flush=flush))
        assert all((g is None) == (index < 3) for g in got)
    assert row["nonfinite"] == 0
    near = 1e-5 if precision == "fp32" else 2e-2
    for mean, gradient, (name, _) in zip(means, got, cached.groups["qwen"], strict=True):
        assert (mean - gradient).norm() <= near * mean.norm(), name


def test_qwen_stands_still_within_a_window_and_moves_at_its_end(small_config, tmp_path):
    trainer = Trainer(small_config(prompt_window=4), tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.groups["qwen"]}
    for index in range(3):
        row = trainer.read(trainer.train_step(trainer.sampler.batch(0, index), 0, flush=False))
        assert row["qwen_grad"] is None and row["agent_grad"] > 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.groups["qwen"])
    row = trainer.read(trainer.train_step(trainer.sampler.batch(0, 3), 0, flush=True))
    assert row["qwen_grad"] > 0
    assert not any(torch.equal(p, before[n]) for n, p in trainer.groups["qwen"])
    # until the next flush the last gradient stands in the log
    again = trainer.read(trainer.train_step(trainer.sampler.batch(0, 4), 0, flush=False))
    assert again["qwen_grad"] == row["qwen_grad"]


def test_a_batch_that_overflows_leaves_its_window_without_a_trace(small_config, tmp_path):
    trainer = Trainer(small_config(prompt_window=2), tmp_path)
    handle = trainer.model.prompt.projection.register_full_backward_hook(
        lambda module, given, got: tuple(g * float("nan") for g in given)
    )
    trainer.read(trainer.train_step(trainer.sampler.batch(0, 0), 0, flush=False))
    handle.remove()
    row = trainer.read(trainer.train_step(trainer.sampler.batch(0, 1), 0, flush=True))
    assert row["nonfinite"] == 0 and 0 < row["qwen_grad"] < float("inf")


def test_every_group_moves_and_every_layer_of_qwen(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    one_batch(trainer)
    assert [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])] == []


def test_optimizer_holds_each_trainable_parameter_once(trainer):
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    rates = {group["name"]: group["peak"] for group in trainer.optimizer.param_groups}
    config = trainer.config
    assert rates == {
        "qwen": config.qwen_lr, "agent": config.agent_lr, "policy": config.policy_lr, "objective": config.agent_lr / 2
    }  # fmt: skip


def test_learning_rates_warm_up_then_fall_to_the_end(trainer):
    config, last = trainer.config, trainer.total_batches
    rates = [trainer.set_learning_rates(step)["qwen"] for step in range(last)]
    assert rates[0] == pytest.approx(config.qwen_lr / config.warmup_batches, rel=0.01)
    peak = rates.index(max(rates))
    assert peak == config.warmup_batches - 1
    assert config.final_lr * config.qwen_lr < rates[-1] < 1.2 * config.final_lr * config.qwen_lr


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_per_group(small_config, tmp_path, precision):
    # under a scaler too: clipped before it is unscaled, a gradient would step far below its bound
    trainer = Trainer(small_config(clip=1e-3, precision=precision), tmp_path)
    seen = {}
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        for name, members in trainer.groups.items():
            seen[name] = torch.stack([p.grad.norm() for _, p in members]).norm().item()
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    metrics = one_batch(trainer)
    assert metrics["agent_grad"] > 1e-2, "the log shows the norm before clipping"
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in seen.values()), seen


def plant_nan(trainer: Trainer) -> str:
    name, parameter = next((n, p) for n, p in trainer.groups["qwen"] if "layers.3" in n and p.ndim == 2)
    parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))
    return name


def test_nan_gradient_stops_and_names_the_tensor(trainer):
    name = plant_nan(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingStopped, match=rf"group qwen, first in {name}.*on-nonfinite"):
        one_batch(trainer)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_nan_gradient_is_skipped_and_counted(small_config, tmp_path):
    trainer = Trainer(small_config(on_nonfinite="skip"), tmp_path)
    plant_nan(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert [one_batch(trainer)["nonfinite"] for _ in range(2)] == [1, 2]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
