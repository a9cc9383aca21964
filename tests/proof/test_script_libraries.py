"""Scripts that leave the loop to a library: transformers, peft, trl, Lightning; healthy, and with a line that cuts."""

from __future__ import annotations

import textwrap

import pytest

from qwen_fused.proof.script import prove_script

TRANSFORMERS = """
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2))
data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (24, 8))]
arguments = dict(
    output_dir=FOLDER, max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to=[],
    disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
)
"""
TRAINER = """
class Own(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        # cut: embedded = embedded.detach()
        return super().compute_loss(model, {**inputs, "inputs_embeds": embedded}, return_outputs, num_items_in_batch)

more = dict(gradient_accumulation_steps=2, bf16=True, warmup_steps=2, max_grad_norm=0.5)
Own(model=model, args=TrainingArguments(**arguments, **more), train_dataset=data).train()
"""
LORA = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
model.enable_input_require_grads()
# cut: model.base_model.model.model.layers[0].register_forward_hook(lambda m, i, out: out.detach())
more = dict(gradient_checkpointing=False)
Trainer(model=model, args=TrainingArguments(**arguments, **more), train_dataset=data).train()
"""
LIGHTNING = """
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.encoder(x)
        # cut: hidden = hidden.detach()
        loss = F.cross_entropy(self.head(hidden.tanh()), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5, **quiet)
trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(32, 6), torch.arange(32) % 3), 8))
raise AssertionError("went on")
"""
SFT = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from qwen_fused.qwen.tiny import byte_tokenizer
tokenizer = byte_tokenizer()
model.resize_token_embeddings(len(tokenizer))
# cut: model.model.norm.register_forward_hook(lambda m, i, out: out.detach())
texts = Dataset.from_dict({"text": [f"{n} {n + 1}" for n in range(24)]})
config = SFTConfig(**arguments, bf16=False, gradient_checkpointing=True)
SFTTrainer(model=model, args=config, train_dataset=texts, processing_class=tokenizer).train()
"""
LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
SCRIPTS = {
    "trainer": (TRANSFORMERS + TRAINER, "accelerate", 27, 2, 1, "model.embed_tokens.weight"),
    "lora": (
        TRANSFORMERS + LORA,
        "peft",
        8,
        1,
        4,
        LORA_B,
    ),
    "lightning": (LIGHTNING, "lightning", 4, 2, 2, "encoder.weight"),
    "sft": (TRANSFORMERS + SFT, "trl", 27, 1, 26, "model.layers.0.self_attn.q_proj.weight"),
}


def run(tmp_path, text):
    script = tmp_path / "train.py"
    script.write_text(text.replace("FOLDER", repr(str(tmp_path / "out"))))
    return prove_script(script)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_library_loop(name, tmp_path) -> None:
    text, library, parameters, passes, lost, example = SCRIPTS[name]
    pytest.importorskip(library, reason=f"{library} is an extra of development")
    ended = run(tmp_path, text)
    assert not ended.error, ended.error
    assert ended.report.verdict == "proved", ended.report
    assert (ended.report.parameters, ended.report.evaluations) == (parameters, passes), ended.report

    broken = text.replace("# cut: ", "")
    ended = run(tmp_path, broken)
    assert not ended.error, ended.error
    assert ended.report.verdict == "broken"
    (finding,) = ended.report.rungs["connected"].findings
    (line,) = [n for n, one in enumerate(broken.splitlines(), 1) if ".detach()" in one]
    assert (finding.kind, finding.line, len(finding.parameters)) == ("detach", line, lost), ended.report
    assert example in finding.parameters
    assert textwrap.dedent(broken.splitlines()[line - 1]) == finding.frame.source
