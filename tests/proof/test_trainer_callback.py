"""ProveCallback in transformers' own Trainer: a healthy run is as without it, a broken one takes no step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from proof_cases import marked
from small_loops import Counting, counting_qwen, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

import qwen_fused as qf

pytest.importorskip("accelerate")


def trainer_of(folder, cls=Trainer, callbacks=(), model=None, **changes) -> Trainer:
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    args = TrainingArguments(**{**settings, **changes})
    model = model or counting_qwen()
    return cls(model=model, args=args, train_dataset=Counting(), callbacks=list(callbacks))


class Metrics(Trainer):
    """Keeps counters and lists of its own, as trl's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.turns, self.seen = 0, {"train": []}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.turns += 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen["train"].append(loss.item())
        return loss


MODES = {
    "plain": {},
    "accumulated": dict(gradient_accumulation_steps=3),
    "two micro-batches": dict(gradient_accumulation_steps=2, max_grad_norm=0.1),
    "bf16": dict(bf16=True),
    "checkpointed": dict(gradient_checkpointing=True),
    "sgd, unclipped": dict(optim="sgd", max_grad_norm=0.0),
    "smoothed": dict(label_smoothing_factor=0.1),
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_healthy_run_is_proved_and_goes_on_as_without(mode, tmp_path) -> None:
    plain = trainer_of(tmp_path, Metrics, **MODES[mode])
    plain.train()
    callback = qf.ProveCallback()
    proved = trainer_of(tmp_path, Metrics, [callback], **MODES[mode])
    proved.train()
    assert callback.report.verdict == "proved", callback.report
    assert callback.report.parameters == len(list(proved.model.parameters()))
    assert torch.equal(weights(plain.model), weights(proved.model))
    assert proved.seen == plain.seen and proved.turns == plain.turns and proved.state.global_step == 3
    whole = {"accumulated": 3}.get(mode)
    assert callback.report.notes == ([f"of the step's {whole} micro-batches the first 2 are judged"] if whole else [])


class Detached(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model.model(inputs["input_ids"]).last_hidden_state.detach()  # here
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), inputs["labels"].flatten())


class OwnBackward(Trainer):
    """Overrides the whole step, and never goes through accelerate."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():  # here
            hidden = model.model(inputs["input_ids"]).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), inputs["labels"].flatten())
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("cls", [Detached, OwnBackward])
def test_broken_run_stops_before_its_first_step_at_the_line(cls, tmp_path) -> None:
    trainer = trainer_of(tmp_path, cls, [qf.ProveCallback()])
    before = weights(trainer.model)
    with pytest.raises(qf.GradientError) as stopped:
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.equal(weights(trainer.model), before)
    function = cls.compute_loss if cls is Detached else cls.training_step
    cut = stopped.value.report.cut
    assert (cut.file, cut.line) == (__file__, marked(function))
    assert f"test_trainer_callback.py:{cut.line} in" in str(stopped.value)
    assert "model.layers.0.self_attn.q_proj.weight" in cut.parameters


class OwnHealthyBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss / 4
        loss.backward()
        return loss.detach()


def test_step_of_its_own_is_proved(tmp_path) -> None:
    callback = qf.ProveCallback()
    trainer_of(tmp_path, OwnHealthyBackward, [callback], gradient_accumulation_steps=2).train()
    assert callback.report.verdict == "proved", callback.report


class ZeroedAfter(Trainer):
    """What comes after the backward pass is part of the step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        model.lm_head.weight.grad = None
        return loss


def test_gradient_erased_after_backward(tmp_path) -> None:
    trainer = trainer_of(tmp_path, ZeroedAfter, [qf.ProveCallback()])
    with pytest.raises(qf.GradientError) as stopped:
        trainer.train()
    (finding,) = stopped.value.report.rungs["applied"].findings
    assert finding.kind == "erased" and finding.parameters == ("lm_head.weight",)
    assert finding.frame.source == "model.lm_head.weight.grad = None"


def test_parameters_that_no_optimizer_holds(tmp_path) -> None:
    model = counting_qwen()
    trainer = trainer_of(tmp_path, callbacks=[qf.ProveCallback()], model=model)
    trainer.optimizer = torch.optim.AdamW(model.model.layers.parameters(), lr=1e-3)
    with pytest.raises(qf.GradientError) as stopped:
        trainer.train()
    (finding,) = stopped.value.report.rungs["declared"].findings
    assert finding.kind == "not in the optimizer" and "lm_head.weight" in finding.parameters


def test_only_warns(tmp_path, caplog) -> None:
    callback = qf.ProveCallback(only_warn=True)
    trainer = trainer_of(tmp_path, Detached, [callback])
    trainer.train()
    assert trainer.state.global_step == 3
    assert callback.report.verdict == "broken"
    (record,) = [record for record in caplog.records if record.name == "qwen_fused"]
    assert record.levelname == "WARNING"
    assert f"test_trainer_callback.py:{marked(Detached.compute_loss)}" in record.message


def test_intended_cut_is_allowed(tmp_path) -> None:
    callback = qf.ProveCallback(allow=["model.*"])
    trainer_of(tmp_path, Detached, [callback]).train()
    assert callback.report.ok, callback.report
    assert callback.report.allowed["model.*"] > 0


def test_lora_is_proved_and_its_frozen_base_is_meant(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    def model():
        base = counting_qwen()
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    plain, callback = trainer_of(tmp_path, model=model()), qf.ProveCallback()
    plain.train()
    proved = trainer_of(tmp_path, callbacks=[callback], model=model())
    proved.train()
    assert callback.report.verdict == "proved", callback.report
    assert "frozen by peft" in callback.report.rungs["declared"].detail
    assert torch.equal(weights(plain.model), weights(proved.model))


def test_clipping_is_part_of_the_step(tmp_path) -> None:
    with pytest.raises(qf.GradientError) as stopped:
        trainer_of(tmp_path, callbacks=[qf.ProveCallback()], max_grad_norm=1e-12, optim="sgd").train()
    (finding,) = stopped.value.report.rungs["applied"].findings
    assert finding.kind == "not moved" and "lm_head.weight" in finding.parameters


class Stateful(Trainer):
    """Draws when it prepares a batch, and weighs every other turn's loss otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prepared, self.turns = [], 0

    def _prepare_inputs(self, inputs):
        self.prepared.append(float(torch.rand(())))
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.turns += 1
        return super().compute_loss(model, inputs) * (1 + self.turns % 2)


def test_state_of_the_trainers_own(tmp_path) -> None:
    plain = trainer_of(tmp_path, Stateful)
    plain.train()
    callback = qf.ProveCallback()
    proved = trainer_of(tmp_path, Stateful, [callback])
    proved.train()
    assert callback.report.verdict == "proved", callback.report
    assert (proved.prepared, proved.turns) == (plain.prepared, plain.turns)
    assert torch.equal(weights(plain.model), weights(proved.model))


class Half(Trainer):
    """fp16 with a gradient scaler, which accelerate leaves to GPUs."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def autocast_smart_context_manager(self, cache_enabled=True):
        return torch.autocast("cpu", torch.float16)


def test_scaled_fp16(tmp_path) -> None:
    plain = trainer_of(tmp_path, Half, max_grad_norm=0.0)
    plain.train()
    callback = qf.ProveCallback()
    proved = trainer_of(tmp_path, Half, [callback], max_grad_norm=0.0)
    proved.train()
    assert callback.report.verdict == "proved", callback.report
    assert torch.equal(weights(plain.model), weights(proved.model))
    assert proved.accelerator.scaler.state_dict() == plain.accelerator.scaler.state_dict()


class Unscaling(TrainerCallback):
    """Takes the scaler away from the optimizer, as a loop of one's own forgets it."""

    def on_train_begin(self, args, state, control, optimizer=None, **rest):
        optimizer.scaler = None


def test_scale_that_nobody_takes_off(tmp_path) -> None:
    callbacks = [qf.ProveCallback(), Unscaling()]
    with pytest.raises(qf.GradientError) as stopped:
        trainer_of(tmp_path, Half, callbacks, max_grad_norm=0.0, optim="sgd").train()
    assert "still scaled" in [f.kind for f in stopped.value.report.rungs["applied"].findings]


class Fetched(TrainerCallback):
    """Counts the batches that the trainer is given, by the tokens that the model reads."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **rest):
        self.losses.append(logs.get("loss"))


def test_what_is_logged_is_as_without(tmp_path) -> None:
    logged = []
    for more in ([], [qf.ProveCallback()]):
        seen = Fetched()
        trainer_of(tmp_path, callbacks=[*more, seen], logging_steps=1).train()
        logged.append(seen.losses[:3])
    assert logged[0] == logged[1] and all(math.isfinite(loss) for loss in logged[0])


def test_proves_again_at_the_next_train(tmp_path) -> None:
    callback = qf.ProveCallback()
    trainer = trainer_of(tmp_path, callbacks=[callback])
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report is not first and callback.report.ok


def test_needs_a_trainer() -> None:
    with pytest.raises(RuntimeError, match="must be called by a transformers Trainer"):
        qf.ProveCallback().on_train_begin(None, None, None)
