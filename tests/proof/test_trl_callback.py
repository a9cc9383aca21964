"""ProveCallback in trl's trainers: losses, metrics and sampling of their own."""

from __future__ import annotations

import pytest
import torch
from proof_cases import marked
from small_loops import counting_qwen, weights

import qwen_fused as qf
from qwen_fused.qwen.tiny import byte_tokenizer

trl = pytest.importorskip("trl", reason="trl is an extra of development")
datasets = pytest.importorskip("datasets")

SETTINGS = dict(
    max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
)  # fmt: skip
TEXTS = [f"{start} {start + 1} {start + 2}" for start in range(24)]


def model():
    tokenizer = byte_tokenizer()
    small = counting_qwen()
    torch.manual_seed(0)
    small.resize_token_embeddings(len(tokenizer))
    small.generation_config.eos_token_id = small.config.eos_token_id = tokenizer.eos_token_id
    return small


def sft(folder, cls=None, callbacks=(), **changes):
    peft_config = changes.pop("peft_config", None)
    args = trl.SFTConfig(output_dir=str(folder), max_length=16, **{**SETTINGS, **changes})
    return (cls or trl.SFTTrainer)(
        model=model(), args=args, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(), callbacks=list(callbacks), peft_config=peft_config,
    )  # fmt: skip


def dpo(folder, callbacks=(), **changes):
    rows = {"prompt": TEXTS, "chosen": [f" {n}" for n in range(24)], "rejected": [" no"] * 24}
    args = trl.DPOConfig(output_dir=str(folder), **{**SETTINGS, **changes})
    return trl.DPOTrainer(
        model=model(), ref_model=model(), args=args, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=byte_tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def grpo(folder, callbacks=(), **changes):
    given = dict(num_generations=4, max_completion_length=4) | SETTINGS | changes
    args = trl.GRPOConfig(output_dir=str(folder), **given)
    return trl.GRPOTrainer(
        model=model(), args=args, train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        processing_class=byte_tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def lora(folder, callbacks=()):
    from peft import LoraConfig

    return sft(folder, callbacks=callbacks, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def accumulated(folder, callbacks=()):
    return sft(folder, callbacks=callbacks, gradient_accumulation_steps=2, bf16=True, gradient_checkpointing=True)


@pytest.mark.parametrize("make", [sft, lora, accumulated, dpo, grpo], ids=lambda make: make.__name__)
def test_healthy_run_is_proved_and_goes_on_as_without(make, tmp_path) -> None:
    plain, callback = make(tmp_path), qf.ProveCallback()
    plain.train()
    proved = make(tmp_path, callbacks=[callback])
    proved.train()
    assert callback.report.verdict == "proved", callback.report
    assert torch.equal(weights(plain.model), weights(proved.model))
    assert proved.state.global_step == 3
    for one, other in zip(plain.state.log_history, proved.state.log_history, strict=True):
        timed = {key for key in one if "time" in key or "second" in key or "runtime" in key}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def cut_trainer():
    class Cut(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()  # here
            return super().compute_loss(model, {**inputs, "inputs_embeds": embedded}, return_outputs)

    return Cut


def test_broken_sft_stops_before_its_first_step_at_the_line(tmp_path) -> None:
    cls = cut_trainer()
    trainer = sft(tmp_path, cls, [qf.ProveCallback()])
    before = weights(trainer.model)
    with pytest.raises(qf.GradientError) as stopped:
        trainer.train()
    assert trainer.state.global_step == 0 and torch.equal(weights(trainer.model), before)
    cut = stopped.value.report.cut
    assert (cut.file, cut.line, cut.parameters) == (
        __file__, marked(cls.compute_loss), ("model.embed_tokens.weight",)
    )  # fmt: skip
