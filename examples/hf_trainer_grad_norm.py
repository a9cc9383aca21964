"""Per-layer gradient norms in a Hugging Face Trainer: measured, clipped and logged without a host sync at each step.

    python examples/hf_trainer_grad_norm.py [output folder]

The measurement comes right after the backward pass: Trainer's own clipping multiplies every gradient by one factor, and
a single NaN would be in all of them. The model here is a small Qwen2 built from a config; the trainer takes any model.
"""

from __future__ import annotations

import re
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import PendingStats, nonfinite_message


def by_layer(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by the layer their name tells ("layers.3"), all others under "rest"."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = re.search(r"layers\.\d+", name)
            layers.setdefault(layer[0] if layer else "rest", []).append((name, parameter))
    return layers


class GradNormTrainer(Trainer):
    """Logs `grad_norm/model` and `grad_norm/<layer>`, clips to one norm, and stops at a NaN by the tensor's name.

    Args:
        clip: bound of the whole model's gradient norm; None clips nothing. Takes the place of `max_grad_norm`.
    """

    def __init__(self, *args, clip: float | None = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.fp16 or self.args.max_grad_norm:
            raise ValueError("GradNormTrainer is for fp32 and bf16, with max_grad_norm=0")
        self.clip = clip
        self.norms: GroupGradNorm | None = None
        self.pending: PendingStats | None = None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.norms is None:
                # by now accelerate has wrapped and sharded the model: these are the parameters that get gradients
                self.norms = GroupGradNorm({"model": by_layer(model)})
            self._read()
            stats = self.norms.measure()
            if self.clip is not None:
                self.norms.clip_(stats, self.clip)
            # read at the next step or log, when the device has long been past it
            self.pending = stats.read_later()
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        report = self._read()
        logs |= {f"grad_norm/{name.removeprefix('model/')}": row["norm"] for name, row in report.items()}
        super().log(logs, *args, **kwargs)

    def _read(self) -> dict:
        report = self.pending.result() if self.pending else {}
        if complaint := nonfinite_message(report):
            raise FloatingPointError(complaint)
        return report


class Counting(Dataset):
    """Sequences that count upwards from a random start: a small model learns them within a few steps."""

    def __init__(self, size: int, length: int, vocabulary: int):
        starts = torch.randint(vocabulary, (size, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (starts + torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def small_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def train(folder: str, clip: float | None = 1.0, steps: int = 20) -> Trainer:
    trainer = GradNormTrainer(
        model=small_qwen(),
        args=TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=5,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Counting(256, 24, 64),
        clip=clip,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        history = train(sys.argv[1] if len(sys.argv) > 1 else scratch).state.log_history
    for entry in history:
        norms = {name.removeprefix("grad_norm/"): value for name, value in entry.items() if "grad_norm/" in name}
        if norms and "loss" in entry:
            told = "  ".join(f"{name} {value:.3f}" for name, value in norms.items())
            print(f"step {entry['step']:3d}  loss {float(entry['loss']):.3f}  {told}")
