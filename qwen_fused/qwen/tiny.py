"""A Qwen that needs no download: the real architecture, small, with random weights from a fixed seed.

The model is built from transformers' own config classes, so it saves, loads, takes LoRA and gradient
checkpointing as any other Qwen does. Its tokenizer is byte-level BPE without merges, built in code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

END_OF_TEXT = "<|endoftext|>"

# two cores: 27 to 33 episodes/s in training with a prompt window of ten, 22 without (docs/LOG.md)
SHAPE = dict(
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    intermediate_size=576,
    max_position_embeddings=8192,
    # as Qwen2.5-0.5B's 0.02 at width 896: a linear layer passes 0.6 of its input's size on
    initializer_range=0.05,
    use_cache=False,
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights on the CPU from `seed`, and leave torch's global generators as they were."""
    # torch.manual_seed would seed the CUDA generators too, and fork_rng(devices=[]) would not restore them
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def byte_tokenizer(added_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte; byte ids are those of GPT-2's and Qwen's vocabularies.

    Args:
        added_tokens: texts that become one token each instead of one per byte, in the order of their ids (from 257).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added_tokens])
    return tokenizer


def tiny_config(vocab_size: int, family: str = "qwen2", **changes: Any) -> PretrainedConfig:
    """The tiny shape as a config of `family`, "qwen2" (Qwen2.5's too) or "qwen3", with `changes` on top."""
    shape = {"vocab_size": vocab_size, **SHAPE, **changes}
    if family == "qwen2":
        return Qwen2Config(**shape)
    if family == "qwen3":
        shape.setdefault("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
        return Qwen3Config(**shape)
    raise ValueError(f'family must be "qwen2" or "qwen3", got {family!r}')


def tiny_qwen(
    seed: int = 0,
    *,
    added_tokens: Sequence[str] = (),
    family: str = "qwen2",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **changes: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build the tiny Qwen backbone and its tokenizer; the same seed gives the same weights, bit for bit.

    Args:
        seed: of the weights; the global generators are neither read nor moved.
        added_tokens: texts that are one token each, see `byte_tokenizer`.
        family: "qwen2" or "qwen3".
        dtype: of the weights.
        attention: transformers' attention implementation.
        **changes: fields of the config that differ from `SHAPE`.

    Returns:
        The backbone without a language-model head, in train mode, and its tokenizer.
    """
    tokenizer = byte_tokenizer(added_tokens)
    config = tiny_config(len(tokenizer), family, **changes)
    with seeded(seed):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train(), tokenizer
