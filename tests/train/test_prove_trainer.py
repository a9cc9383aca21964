"""The proof of the trainer's own step: no false alarm in any mode, and the faults that it was built to find."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from proof_cases import marked, only_finding

from qwen_fused.planner.objective import PlanObjective
from qwen_fused.planner.policy import PromptPolicy
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.train.prove_trainer import INTENDED_CUTS, prove_trainer
from qwen_fused.train.trainer import Trainer

WINDOW = dict(prompt_window=6, prompt_visits=3)
MODES = {
    "default": {},
    "conv": dict(agent="conv"),
    "lora": dict(lora_rank=4),
    "bf16": dict(precision="bf16"),
    "fp16": dict(precision="fp16"),
    "bfloat16 weights": dict(qwen_dtype="bfloat16"),
    "checkpointing": dict(gradient_checkpointing=True),
    "window": WINDOW,
    "window, graphs kept": WINDOW | dict(window_mode="retain"),
    "window, fp16": WINDOW | dict(precision="fp16"),
    "all at once": WINDOW
    | dict(lora_rank=4, precision="bf16", qwen_dtype="bfloat16", gradient_checkpointing=True, hard_mode="cell"),
}


@pytest.fixture
def make(small_config, tmp_path):
    """Changes of the configuration -> a trainer."""
    return lambda **changes: Trainer(small_config(plan_steps=2, **changes), tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_healthy_step_is_proved(make, mode):
    trainer = make(**MODES[mode])
    before = copy.deepcopy([trainer.model.state_dict(), trainer.scaler.state_dict(), torch.get_rng_state()])
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    report = prove_trainer(trainer)
    assert report.ok and report.cut is None and report.findings == [], str(report)
    # every allowance is needed, and nothing else is cut but what the window's flush carries on from
    assert report.allowed.keys() == set(INTENDED_CUTS) and all(report.allowed.values())
    (note,) = report.notes
    assert note.startswith("the gradient is carried past Tensor.detach at qwen_fused/window/prompt_window.py")
    after = [trainer.model.state_dict(), trainer.scaler.state_dict(), torch.get_rng_state()]
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (before, after)), strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    assert rates == [group["lr"] for group in trainer.optimizer.param_groups]
    assert not trainer.optimizer.state and not trainer.window.batches
    assert all(p.grad is None for p in trainer.model.parameters())


def test_run_is_the_same_after_a_proof(make):
    def first_batches(proving):
        torch.manual_seed(0)
        trainer = make(**WINDOW)
        if proving:
            prove_trainer(trainer)
        steps = [(trainer.sampler.batch(0, k), trainer.sampler.ends_window(k)) for k in range(8)]
        return [trainer.read(trainer.train_step(batch, 0, flush=ends)) for batch, ends in steps]

    assert first_batches(proving=True) == first_batches(proving=False)


def test_refuses_the_middle_of_a_window(make):
    trainer = make(**WINDOW)
    trainer.train_step(trainer.sampler.batch(0, 0), 0, flush=False)
    with pytest.raises(RuntimeError, match="prove before a window's first batch: this one has had 1"):
        prove_trainer(trainer)


def qwens(trainer):
    return {name for name, _ in trainer.groups["qwen"]}


@pytest.mark.parametrize("graph", [False, True], ids=["values kept", "graph kept"])
def test_prompts_shared_through_a_stale_cache(make, graph):
    trainer, cache = make(**WINDOW), {}
    encode = trainer.window.encode

    def cached(keys):
        for key in keys:
            if key not in cache:
                cache[key] = encode([key])
                cache[key] = cache[key] if graph else cache[key].detach()
        return torch.cat([cache[key] for key in keys]).requires_grad_()  # here

    trainer.window.encode = cached
    report = prove_trainer(trainer)
    stale = [f for f in report.rungs["applied"].findings if f.kind == "stale cache"]
    assert len(stale) == 1 and stale[0].line == marked(cached) and set(stale[0].parameters) == qwens(trainer)


def test_prompts_of_a_window_that_is_over(make):
    trainer, forward = make(**WINDOW), QwenPrompt.forward
    kept = []

    def late(demonstrations, pooled=None):
        kept.append(pooled)
        return forward(trainer.model.prompt, demonstrations, kept[0])

    trainer.model.prompt.forward = late
    report = prove_trainer(trainer)
    assert not report.ok and "whose window is over" in str(report)


def test_flush_left_out(make, monkeypatch):
    trainer = make(**WINDOW)
    monkeypatch.setattr(trainer.window, "flush", lambda scale: None)
    report = prove_trainer(trainer)
    found = only_finding(report, "connected", "detach")
    assert set(found.parameters) == qwens(trainer) and found.file.endswith("window.py")


def test_flush_at_another_scale(make, monkeypatch):
    # wide enough for its share of the loss's slope to stand out alone
    trainer = make(**WINDOW, qwen="tiny")
    flush = trainer.window.flush
    monkeypatch.setattr(trainer.window, "flush", lambda scale: flush(scale / 2))
    found = only_finding(prove_trainer(trainer), "correct", "wrong")
    assert set(found.parameters) <= qwens(trainer)


def test_projection_made_in_forward(make):
    trainer = make()

    def forward(pooled):
        return nn.Linear(pooled.shape[1], 32)(pooled)  # here

    trainer.model.prompt.projection.forward = forward
    report = prove_trainer(trainer)
    lost = only_finding(report, "connected", "unused").parameters
    assert lost and all(name.startswith("prompt.projection") for name in lost)
    fresh = only_finding(report, "applied", "fresh")
    assert fresh.line == marked(forward)
    # the gradient that does reach Qwen through a random layer means nothing, and looks well
    assert report.rungs["nonzero"].ok and report.rungs["correct"].ok


def test_policy_that_is_cut_from_both_its_gradients(make, monkeypatch):
    forward = PromptPolicy.forward

    def observed(self, *args, **kwargs):
        action = forward(self, *args, **kwargs)
        refined = action.refined.detach() + 0 * args[0]
        return replace(action, refined=refined, log_prob=action.log_prob.detach())  # here

    trainer = make()
    monkeypatch.setattr(PromptPolicy, "forward", observed)
    report = prove_trainer(trainer)
    findings = report.rungs["connected"].findings
    assert {f.kind for f in findings} == {"detach"} and marked(observed) in {f.line for f in findings} | {
        f.line + 1 for f in findings
    }
    assert {"policy.mean.weight", "policy.mean.bias"} <= set(report.rungs["connected"].parameters)


def test_log_probability_alone_detached_is_noted(make, monkeypatch):
    forward = PromptPolicy.forward

    def observed(self, *args, **kwargs):
        action = forward(self, *args, **kwargs)
        return replace(action, log_prob=action.log_prob.detach())  # here

    trainer = make()
    monkeypatch.setattr(PromptPolicy, "forward", observed)
    notes = [note for note in prove_trainer(trainer).notes if note.startswith("one way to the loss is cut")]
    assert len(notes) == 1 and f"test_prove_trainer.py:{marked(observed)}" in notes[0]


def test_policy_gradient_zeroed_before_its_step(make):
    trainer = make()
    step = trainer.step

    def zeroing():
        trainer.model.policy.zero_grad()  # here
        return step()

    trainer.step = zeroing
    found = only_finding(prove_trainer(trainer), "applied", "erased")
    assert found.line == marked(zeroing) and all(name.startswith("policy.") for name in found.parameters)


def test_preference_made_after_the_optimizer(make, monkeypatch):
    forward = PlanObjective.preference_logits

    def lazy(self, prompt, height, width):
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.randn(10))  # here
        return forward(self, prompt, height, width) + self.late[:, None, None]

    trainer = make()
    monkeypatch.setattr(PlanObjective, "preference_logits", lazy)
    found = only_finding(prove_trainer(trainer), "applied", "created late")
    assert found.parameters == ("objective.late",) and found.line in (marked(lazy), marked(lazy) + 1)
    assert not hasattr(trainer.model.objective, "late")


def test_two_qwens_one_of_them_never_trained(make):
    trainer = make()
    trainer.model.prompt.backbone = copy.deepcopy(trainer.model.prompt.backbone)
    report = prove_trainer(trainer)
    assert set(only_finding(report, "declared", "not in the optimizer").parameters) == qwens(trainer)


def test_adapters_zero_on_both_sides(make):
    trainer = make(lora_rank=4)
    with torch.no_grad():
        for _, parameter in trainer.groups["qwen"]:
            parameter.zero_()
    rung = prove_trainer(trainer).rungs["nonzero"]
    assert rung.ok is False and set(rung.parameters) == qwens(trainer)
    assert {f.kind for f in rung.findings} == {"zero"}


def test_qwen_in_evaluation_mode(make):
    trainer = make()
    trainer.model.prompt.backbone.eval()
    found = only_finding(prove_trainer(trainer), "declared", "eval mode")
    assert set(found.parameters) == qwens(trainer) and "prompt.backbone" in found.detail


def test_qwen_outside_the_optimizer(make):
    trainer = make()
    for group in trainer.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not q for _, q in trainer.groups["qwen"])]
    assert set(only_finding(prove_trainer(trainer), "declared", "not in the optimizer").parameters) == qwens(trainer)


def test_scale_that_nobody_takes_off(make, monkeypatch):
    trainer = make(precision="fp16")
    # clipped while scaled, the gradients are all clip and no gradient; unclipped, they are 65536 times too large
    monkeypatch.setattr(trainer.scaler, "unscale_", lambda optimizer: None)
    monkeypatch.setattr(trainer.norms, "clip_", lambda stats, limit: None)
    monkeypatch.setattr(trainer.scaler, "step", lambda optimizer: optimizer.step())
    monkeypatch.setattr(trainer.scaler, "update", lambda: None)
    found = only_finding(prove_trainer(trainer), "applied", "still scaled")
    assert "65536" in found.detail
