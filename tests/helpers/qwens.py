"""Qwens of the true architectures, small, saved to a folder as a download would be."""

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from qwen_fused.qwen.tiny import byte_tokenizer, seeded

SMALL = dict(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=4096,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
DEEPER = {**SMALL, "num_hidden_layers": 4}
LINEAR = dict(
    head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)


def newer(name: str) -> type:
    """A configuration that the oldest transformers does not know yet: without it a test is skipped."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    # what sets Qwen2.5-0.5B apart: tied embeddings, a larger rotary base, dormant sliding windows
    "qwen2.5": lambda: Qwen2Config(
        **SMALL, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, rope_theta=1e6),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16),
    # three layers of linear attention before one of the other; routed experts
    "qwen3_next": lambda: Qwen3NextConfig(**DEEPER, **EXPERTS, **LINEAR, shared_expert_intermediate_size=32),
    "qwen3.5": lambda: newer("Qwen3_5TextConfig")(**DEEPER, **LINEAR, tie_word_embeddings=True),
}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's byte-level BPE with its word pattern and a few merges, standing for its 151 thousand."""
    merges = [("i", "n"), ("o", "u"), ("ou", "t"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("p", "u"), ("pu", "t")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def save_qwen(folder, kind="qwen2.5", tokenizer=None, dtype=torch.float32, **changes):
    """Save a true-architecture causal Qwen with random weights, as a download would be, and return it."""
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    with seeded(11):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # biases and norms of a trained model are not at their initial zeros and ones
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return model


def exact_rms_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """Qwen's RMSNorm in the precision of its input; transformers' own rounds to float32 inside."""
    variance = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def exact_norms(monkeypatch):
    """Let Qwens of double precision be exact to double precision."""
    for norm in (modeling_qwen2.Qwen2RMSNorm, modeling_qwen3.Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_rms_norm)
