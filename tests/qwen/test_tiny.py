"""The tiny Qwen: a real architecture, the same weights from a seed, a byte tokenizer that saves and loads."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, Qwen2Model, Qwen3Model

from qwen_fused.qwen.tiny import byte_tokenizer, seeded, tiny_qwen

SMALL = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
TEXT = "in:\n077\n700\nout:\n12\ntwo  words, é\n\n"


@pytest.mark.parametrize(("family", "kind"), [("qwen2", Qwen2Model), ("qwen3", Qwen3Model)])
def test_is_the_real_architecture(family, kind):
    model, tokenizer = tiny_qwen(family=family, **SMALL)
    assert type(model) is kind and model.training
    assert model.config.vocab_size == len(tokenizer)
    assert not hasattr(model, "lm_head")


def test_same_seed_same_weights_and_no_global_draw():
    before = torch.get_rng_state()
    first, second, other = (tiny_qwen(seed, **SMALL)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_seeded_restores_the_generator_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(1):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


def test_one_token_per_byte_and_back():
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode()) and len(tokenizer) == 257
    assert tokenizer.decode(ids) == TEXT
    # the bytes' ids are Qwen's: "!" opens the vocabulary, digits follow each other
    assert tokenizer("!09")["input_ids"] == [0, 15, 24]


def test_whole_texts_are_one_token():
    tokenizer = byte_tokenizer(("in:\n", "A rule."))
    assert tokenizer("A rule.\nin:\n07")["input_ids"] == [258, 198, 257, 15, 22]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_saves_and_loads_like_any_other(family, tmp_path):
    model, tokenizer = tiny_qwen(1, family=family, added_tokens=("out:\n",), **SMALL)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, read = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(read(TEXT, return_tensors="pt")["input_ids"], ids) and read.decode(ids[0]) == TEXT
    with torch.no_grad():
        want, got = model.eval()(ids).last_hidden_state, again(ids).last_hidden_state
    assert torch.equal(got, want)


def test_rejects_another_family():
    with pytest.raises(ValueError, match="qwen2"):
        tiny_qwen(family="llama")
