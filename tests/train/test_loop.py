"""The run: what it leaves, that it continues bit for bit, watches, and stops with a sentence when it must."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import rows as untimed

from qwen_fused.arc.episodes import leave_one_out, test_episodes
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.report.run_log import METRICS, RunLog
from qwen_fused.train import clock as run_clock
from qwen_fused.train.checkpoint import list_checkpoints, read_state
from qwen_fused.train.loop import new_run_folder, train
from qwen_fused.train.monitor import GradientMonitor
from qwen_fused.train.trainer import Trainer, TrainingStopped
from qwen_fused.train.validation import validate


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(config_in, tmp_path_factory) -> Iterator[Path]:
    """The folder of a run of ten batches, two epochs, to its report; a batch takes a second of its clock."""
    trained, seconds = Trainer.train_step, itertools.count()
    clock = SimpleNamespace(now=next(seconds))

    def train_step(*args, **options):
        clock.now = next(seconds)
        return trained(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr(run_clock, "time", SimpleNamespace(monotonic=lambda: clock.now))
        yield train(config_in(tmp_path_factory.mktemp("runs"), max_batches=10, eval_every=1, batch_size=8))


def test_run_leaves_everything_it_promises(whole):
    for name in ("config.yaml", "train.log", "metrics.jsonl", "evaluation.json", "submission.json", "report.html"):
        assert (whole / name).stat().st_size > 0, name
    metrics = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert all(tuple(row) == METRICS for row in metrics)
    # an epoch's last batch is smaller; the last of all is read right after the one before it, and took its second too
    assert [row["episodes_per_second"] for row in metrics] == [8.0, 8.0, 8.0, 8.0, 6.0] * 2
    assert all(row["qwen_grad"] > 0 and row["prompt_grad"] > 0 and row["policy_grad"] > 0 for row in metrics)
    log = (whole / "train.log").read_text()
    for name in ("Reward", "Loss", "Qwen_grad", "Mask_ratio", "Accuracy"):
        assert f"{name}: " in log
    assert "[Batch   10] Reward:" in log and "Report: " in log
    assert (whole / "checkpoints" / "best.safetensors").exists()


def test_log_lines_are_means_of_the_metrics(whole):
    metrics = read_lines(whole / "metrics.jsonl")
    log = (whole / "train.log").read_text()
    # a line after the first batch and every five
    for step, batches in ((1, metrics[:1]), (5, metrics[1:5]), (10, metrics[5:10])):
        loss, cells = (np.mean([row[key] for row in batches]) for key in ("loss", "accuracy"))
        assert re.search(rf"\[Batch +{step}\] .*Loss: {loss:7.4f} .*Accuracy: {cells:.4f}\n", log)
    assert log.count("[Batch ") == 3


@pytest.mark.parametrize("tokens", [82, 512])
def test_prompts_that_are_cut_are_told_once_with_the_flag(small_config, unevaluated, tokens):
    folder = train(small_config(max_batches=3, max_prompt_tokens=tokens))
    trainer, log = Trainer(small_config(max_prompt_tokens=tokens), folder), (folder / "train.log").read_text()
    text = trainer.model.prompt.prompt_text
    asked = text.encode([e.demonstrations for task in trainer.training for e in leave_one_out(task)])
    cut = sum(encoded.truncated for encoded in asked)
    assert log.count("--max-prompt-tokens") == (1 if tokens < 512 else 0)
    if tokens < 512:
        assert 0 < cut < len(asked) and f"Cut to {tokens} tokens: {cut} of {len(asked)} training prompts and " in log
    # each batch has its share
    for step, row in enumerate(read_lines(folder / "metrics.jsonl")):
        texts = text.encode([episode.demonstrations for episode in trainer.sampler.batch(0, step)])
        assert row["truncated"] == pytest.approx(np.mean([encoded.truncated for encoded in texts]))


def test_layers_and_predictions_are_kept(whole):
    norms = read_lines(whole / "gradients.jsonl")
    assert [row["step"] for row in norms] == list(range(1, 11))
    for row, metrics in zip(norms, read_lines(whole / "metrics.jsonl"), strict=True):
        assert {"layer 0", "other"} <= set(row["norms"])
        # the layers are all of Qwen
        assert sum(n * n for n in row["norms"].values()) ** 0.5 == pytest.approx(metrics["qwen_grad"], rel=1e-4)
    shown = read_lines(whole / "predictions.jsonl")
    ids = [[(e["task_id"], e["index"]) for e in row["examples"]] for row in shown]
    assert shown[0]["step"] == 0 and shown[-1]["step"] == 10 and len(shown) >= 3
    assert all(row == ids[0] for row in ids) and ids[0]
    assert any(a["predicted"] != b["predicted"] for a, b in zip(*[shown[k]["examples"] for k in (0, -1)], strict=True))
    # the last validation is the evaluation of the run
    evaluation = json.loads((whole / "evaluation.json").read_text())["validation"]["records"]
    attempts = {(r["task_id"], r["index"]): r["attempts"][0] for r in evaluation}
    assert all(e["predicted"] == attempts[e["task_id"], e["index"]] for e in shown[-1]["examples"])
    sizes = {(r["task_id"], r["index"]): tuple(r["answer_size"]) for r in evaluation}
    assert all(np.shape(e["target"]) == sizes[e["task_id"], e["index"]] for e in shown[-1]["examples"])


def test_layers_are_kept_where_qwen_steps(small_config, unevaluated):
    # an epoch has 10 batches: windows of 4 end after 4, 8 and, with the epoch, 10
    folder = train(small_config(max_batches=12, prompt_window=4))
    assert [row["step"] for row in read_lines(folder / "gradients.jsonl")] == [4, 8, 10]


# an epoch has 10 batches; with windows of 4, batches 6 and 7 are in the middle of one
@pytest.mark.parametrize(("window", "mode", "at"), [(1, "recompute", 10), (4, "recompute", 6), (4, "retain", 7)])
def test_resume_is_bitwise(small_config, unevaluated, window, mode, at):
    config = small_config(prompt_window=window, window_mode=mode)
    straight = train(replace(config, max_batches=16))
    broken = train(replace(config, max_batches=at))
    again = train(replace(config, max_batches=16, resume=broken))
    assert again == broken
    assert [row["step"] for row in untimed(broken)] == list(range(1, 17)) and untimed(straight) == untimed(broken)
    assert (straight / "gradients.jsonl").read_text() == (broken / "gradients.jsonl").read_text()
    states = [read_state(list_checkpoints(f / "checkpoints")[-1]) for f in (straight, broken)]
    torch.testing.assert_close(*[s["model"] for s in states], rtol=0, atol=0)
    torch.testing.assert_close(*[s["optimizer"]["state"] for s in states], rtol=0, atol=0)


def test_nan_gradient_leaves_a_checkpoint_from_before_it(small_config, monkeypatch):
    train_step = Trainer.train_step

    def planting(self, *args, **options):
        if self.progress.step == 3:
            next(p for _, p in self.groups["qwen"]).register_hook(lambda grad: grad * float("nan"))
        return train_step(self, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", planting)
    config = small_config(max_batches=8)
    with pytest.raises(TrainingStopped, match="batch 4: .*group qwen"):
        train(config)
    (folder,) = config.out.iterdir()
    # its own row is there, and that of the batch that was under way
    assert [(row["step"], row["nonfinite"]) for row in untimed(folder)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    state = read_state(list_checkpoints(folder / "checkpoints")[-1])
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {3.0}


def test_best_weights_are_chosen_by_held_out_tasks(small_config, tmp_path):
    trainer, log = Trainer(small_config(), tmp_path), RunLog(tmp_path)
    held_out = {e.task_id for e in test_episodes(trainer.held_out)}
    assert held_out and not held_out & {t.id for t in trainer.training}
    result = validate(trainer, log).result
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
    a = [plain.read(plain.train_step(plain.sampler.batch(0, k), 0)) for k in range(2)]
    torch.manual_seed(1)
    log, b = RunLog(tmp_path), []
    for k in range(2):
        validate(watched, log)
        b.append(watched.read(watched.train_step(watched.sampler.batch(0, k), 0)))
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
    assert proof["cut"]["kind"] == "detach" and proof["cut"]["file"].endswith("test_loop.py")
    assert any("layers.0" in name for name in proof["rungs"]["connected"]["parameters"])
    assert (folder / "metrics.jsonl").read_text() == ""


def test_symptom_is_told_in_the_log(small_config, unevaluated, monkeypatch):
    init = Trainer.__init__

    def impatient(self, *args):
        init(self, *args)
        self.monitor = GradientMonitor(patience=5)
        for _, parameter in self.groups["qwen"]:
            parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(Trainer, "__init__", impatient)
    folder = train(small_config(max_batches=6))
    assert "hint: batch 5: the gradient of qwen has been 0 for 5 batches" in (folder / "train.log").read_text()


def test_run_folders_never_collide(tmp_path):
    folders = [new_run_folder(tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3 and all(f.is_dir() for f in folders)


@pytest.mark.parametrize("window, batches, told", [(10, 3, 1), (3, 3, 0), (10, 12, 0)])
def test_a_run_in_which_qwen_cannot_step_says_so(small_config, unevaluated, window, batches, told):
    run = train(small_config(prompt_window=window, max_batches=batches))
    said = (run / "train.log").read_text()
    assert said.count(f"Qwen does not step: the run has {batches} batches, and its prompt window {window}.") == told
    steps = [row["qwen_grad"] for row in read_lines(run / "metrics.jsonl")]
    assert any(steps) != bool(told)


def test_minutes_too_few_for_a_window_are_told_at_the_end(small_config, unevaluated):
    run = train(small_config(prompt_window=10, max_minutes=1e-6))
    assert "Qwen does not step: the run has 1 batches, and its prompt window 10." in (run / "train.log").read_text()
