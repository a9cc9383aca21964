"""The run: it learns, continues bit for bit, clips what it says, and stops with a sentence when it must."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_fused.checkpoint import list_checkpoints, read_state
from qwen_fused.data import test_episodes
from qwen_fused.device import resolve_device
from qwen_fused.monitor import GradientMonitor
from qwen_fused.prompt import QwenPrompt
from qwen_fused.runlog import METRICS, RunLog
from qwen_fused.train import new_run_folder, train, validate
from qwen_fused.trainer import Trainer, TrainingStopped, by_layer


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "episodes_per_second"} for row in metrics]


@pytest.fixture
def trainer(small_config, tmp_path) -> Trainer:
    return Trainer(small_config(), tmp_path)


def one_batch(trainer: Trainer) -> dict:
    step = trainer.progress.step
    epoch, index = divmod(step, trainer.sampler.batches_per_epoch())
    return trainer.read(trainer.train_step(trainer.sampler.batch(epoch, index), epoch))


def test_run_leaves_everything_it_promises(small_config):
    folder = train(small_config(max_batches=12))
    for name in ("config.yaml", "train.log", "metrics.jsonl", "evaluation.json", "submission.json", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert all(tuple(row) == METRICS for row in metrics)
    # the last batch is read right after the one before it, and took its time all the same
    assert metrics[-1]["episodes_per_second"] < 20 * metrics[-2]["episodes_per_second"]
    assert all(row["qwen_grad"] > 0 and row["prompt_grad"] > 0 and row["policy_grad"] > 0 for row in metrics)
    log = (folder / "train.log").read_text()
    for name in ("Reward", "Loss", "Qwen_grad", "Mask_ratio", "Accuracy"):
        assert f"{name}: " in log
    assert "[Batch   10] Reward:" in log and "Report: " in log
    assert (folder / "checkpoints" / "best.safetensors").exists()


def test_layers_and_predictions_are_kept(small_config):
    config = small_config(max_batches=10, eval_every=1, batch_size=8)
    folder = train(config)
    norms = [json.loads(line) for line in (folder / "gradients.jsonl").read_text().splitlines()]
    assert [row["step"] for row in norms] == list(range(1, 11))
    for row, metrics in zip(norms, rows(folder), strict=True):
        assert {"layer 0", "other"} <= set(row["norms"])
        # the layers are all of Qwen
        assert sum(n * n for n in row["norms"].values()) ** 0.5 == pytest.approx(metrics["qwen_grad"], rel=1e-4)
    shown = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    ids = [[(e["task_id"], e["index"]) for e in row["examples"]] for row in shown]
    assert shown[0]["step"] == 0 and shown[-1]["step"] == 10 and len(shown) >= 3
    assert all(row == ids[0] for row in ids) and ids[0]
    assert any(a["predicted"] != b["predicted"] for a, b in zip(*[shown[k]["examples"] for k in (0, -1)], strict=True))
    # the last validation is the evaluation of the run
    evaluation = json.loads((folder / "evaluation.json").read_text())["validation"]["records"]
    attempts = {(r["task_id"], r["index"]): r["attempts"][0] for r in evaluation}
    assert all(e["predicted"] == attempts[e["task_id"], e["index"]] for e in shown[-1]["examples"])
    sizes = {(r["task_id"], r["index"]): tuple(r["answer_size"]) for r in evaluation}
    assert all(np.shape(e["target"]) == sizes[e["task_id"], e["index"]] for e in shown[-1]["examples"])


def test_layers_are_kept_where_qwen_steps(small_config):
    # an epoch has 10 batches: windows of 4 end after 4, 8 and, with the epoch, 10
    folder = train(small_config(max_batches=12, prompt_window=4))
    norms = [json.loads(line) for line in (folder / "gradients.jsonl").read_text().splitlines()]
    assert [row["step"] for row in norms] == [4, 8, 10]


# an epoch has 10 batches: with windows of 4, batch 18 is in the middle of one
@pytest.mark.parametrize(("window", "mode", "at"), [(1, "recompute", 20), (4, "recompute", 18), (4, "retain", 17)])
def test_resume_is_bitwise(small_config, window, mode, at):
    config = small_config(prompt_window=window, window_mode=mode)
    straight = train(replace(config, max_batches=40))
    broken = train(replace(config, max_batches=at))
    again = train(replace(config, max_batches=40, resume=broken))
    assert again == broken
    a, b = rows(straight), rows(broken)
    assert len(a) == len(b) == 40 and untimed(a) == untimed(b)
    assert (straight / "gradients.jsonl").read_text() == (broken / "gradients.jsonl").read_text()
    states = [read_state(list_checkpoints(f / "checkpoints")[-1]) for f in (straight, broken)]
    torch.testing.assert_close(*[s["model"] for s in states], rtol=0, atol=0)
    torch.testing.assert_close(*[s["optimizer"]["state"] for s in states], rtol=0, atol=0)


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": k}) for k in (1, 2, 3)] + ['{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    RunLog(tmp_path, resume_step=2).close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


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

    def forward(batch, *, epoch, part):
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            out = direct.model(batch, epoch=epoch)
        return out, out.prompt

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


def test_loss_falls_on_one_batch(small_config, tmp_path):
    trainer = Trainer(small_config(warmup_batches=1, agent_lr=1e-2), tmp_path)
    episodes = trainer.sampler.batch(0, 0)
    losses = [trainer.read(trainer.train_step(episodes, 1))["efe"] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


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


def test_nan_gradient_leaves_a_checkpoint_from_before_it(small_config, monkeypatch):
    train_step = Trainer.train_step

    def planting(self, *args, **options):
        if self.progress.step == 3:
            plant_nan(self)
        return train_step(self, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", planting)
    config = small_config(max_batches=8)
    with pytest.raises(TrainingStopped, match="batch 4: .*group qwen"):
        train(config)
    (folder,) = config.out.iterdir()
    # its own row is there, and that of the batch that was under way
    assert [(row["step"], row["nonfinite"]) for row in rows(folder)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    state = read_state(list_checkpoints(folder / "checkpoints")[-1])
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {3.0}


def test_nan_gradient_is_skipped_and_counted(small_config, tmp_path):
    trainer = Trainer(small_config(on_nonfinite="skip"), tmp_path)
    plant_nan(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert [one_batch(trainer)["nonfinite"] for _ in range(2)] == [1, 2]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_bf16_autocast_runs_the_plan_in_bf16_and_trains(small_config, tmp_path):
    trainer = Trainer(small_config(precision="bf16"), tmp_path)
    kinds = []
    trainer.model.agent.core.local.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    metrics = [one_batch(trainer) for _ in range(3)]
    assert set(kinds) == {torch.bfloat16}
    assert all(row["qwen_grad"] > 0 and row["loss"] == row["loss"] for row in metrics)


def test_fp16_scaler_unscales_before_norms_and_skips_an_overflow(small_config, tmp_path):
    torch.manual_seed(0)
    plain = Trainer(small_config(), tmp_path / "a")
    scaled = Trainer(small_config(precision="fp16"), tmp_path / "b")
    a, b = one_batch(plain), one_batch(scaled)
    # the norms are those of the true gradient, whatever the scale: half precision moves them a little
    for name in ("qwen_grad", "prompt_grad", "agent_grad"):
        assert b[name] == pytest.approx(a[name], rel=0.1), name
    handle = next(p for _, p in scaled.groups["qwen"]).register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in scaled.model.parameters()]
    scale = scaled.scaler.get_scale()
    assert one_batch(scaled)["nonfinite"] == 1
    assert scaled.scaler.get_scale() < scale
    assert all(torch.equal(p, q) for p, q in zip(scaled.model.parameters(), before, strict=True))
    handle.remove()
    one_batch(scaled)
    assert not all(torch.equal(p, q) for p, q in zip(scaled.model.parameters(), before, strict=True))


def test_sigint_leaves_a_checkpoint_to_continue_from(small_config, monkeypatch):
    config = small_config(max_batches=8)
    train_step = Trainer.train_step

    def interrupting(self, *args, **options):
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (folder,) = config.out.iterdir()
    assert read_state(list_checkpoints(folder / "checkpoints")[-1])["progress"]["step"] == 5
    assert "--resume" in (folder / "train.log").read_text()
    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(replace(config, resume=folder))
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))


def test_best_weights_are_chosen_by_held_out_tasks(trainer, tmp_path):
    log = RunLog(tmp_path)
    held_out = {e.task_id for e in test_episodes(trainer.held_out)}
    assert held_out and not held_out & {t.id for t in trainer.training}
    result = validate(trainer, log)
    assert {r.task_id for r in result.records} == held_out
    assert trainer.progress.best_accuracy == result.cell_accuracy
    written = (tmp_path / "checkpoints" / "best.safetensors").stat().st_mtime_ns
    trainer.progress.best_accuracy = 2.0
    validate(trainer, log)
    assert (tmp_path / "checkpoints" / "best.safetensors").stat().st_mtime_ns == written
    log.close()


def test_validation_disturbs_nothing(small_config, tmp_path):
    # the same batches with and without evaluations in between
    plain, watched = (Trainer(small_config(), tmp_path / name) for name in "ab")
    torch.manual_seed(1)
    a = [one_batch(plain) for _ in range(4)]
    torch.manual_seed(1)
    log, b = RunLog(tmp_path), []
    for _ in range(4):
        validate(watched, log)
        b.append(one_batch(watched))
    log.close()
    assert a == b


def test_cut_prompt_stops_the_run_before_its_first_batch(small_config, monkeypatch):
    forward = QwenPrompt.forward

    def cut(self, demonstrations, pooled=None):
        out = forward(self, demonstrations, pooled)
        return replace(out, prompt=out.prompt.detach())

    monkeypatch.setattr(QwenPrompt, "forward", cut)
    config = small_config(prove=True)
    with pytest.raises(TrainingStopped, match="no-prove"):
        train(config)
    (folder,) = config.out.iterdir()
    proof = json.loads((folder / "proof.json").read_text())
    assert not proof["ok"] and not proof["rungs"]["connected"]["ok"]
    assert proof["cut"]["kind"] == "detach" and proof["cut"]["file"].endswith("test_train.py")
    assert any("layers.0" in name for name in proof["rungs"]["connected"]["parameters"])
    assert (folder / "metrics.jsonl").read_text() == ""


def test_symptom_is_told_in_the_log(small_config, monkeypatch):
    init = Trainer.__init__

    def impatient(self, *args):
        init(self, *args)
        self.monitor = GradientMonitor(patience=5)
        for _, parameter in self.groups["qwen"]:
            parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(Trainer, "__init__", impatient)
    folder = train(small_config(max_batches=8))
    assert "hint: batch 5: the gradient of qwen has been 0 for 5 batches" in (folder / "train.log").read_text()


def test_out_of_memory_names_the_flags(small_config, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(TrainingStopped, match="2.00 GiB.*--batch-size"):
        train(small_config())


def test_layers_are_told_apart():
    names = ["prompt.backbone.layers.0.x", "prompt.backbone.layers.11.y", "prompt.backbone.norm.weight"]
    parts = by_layer([(name, torch.nn.Parameter(torch.zeros(1))) for name in names])
    assert list(parts) == ["layer 0", "layer 11", "other"]


def test_run_folders_never_collide(tmp_path):
    folders = [new_run_folder(tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3 and all(f.is_dir() for f in folders)


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:99"])
def test_refuses_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device"):
        resolve_device(name)
