"""Transformers' architectures built tiny and peft's methods on a tiny Qwen, each with a step of language modelling."""

from __future__ import annotations

from typing import Any

import torch
from proof_field import given

# sizes that make a model tiny, under all the names that configurations have for them
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "d_ff": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
CAUSAL = [
    "apertus",
    "arcee",
    "biogpt",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "ctrl",
    "diffllama",
    "doge",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "jetmoe",
    "lfm2",
    "llama",
    "mamba",
    "minimax",
    "ministral",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "roformer",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xglm",
    "xlnet",
    "bert",
    "roberta",
    "electra",
    "rembert",
    "megatron-bert",
    "bart",
    "mbart",
]
ENCODERS = [
    "albert",
    "bert",
    "convbert",
    "deberta-v2",
    "distilbert",
    "electra",
    "fnet",
    "funnel",
    "layoutlm",
    "mobilebert",
    "nystromformer",
    "squeezebert",
]
SEQUENCES = ["mt5", "bart", "pegasus", "marian", "blenderbot", "m2m_100", "led"]
# parameters that an architecture has and this loss does not use, and operations with a backward of their own
UNUSED: dict[str, tuple[str, ...]] = {
    "bart": ("model.decoder.layers.*.encoder_attn*",),
    "mbart": ("model.decoder.layers.*.encoder_attn*",),
    "xlnet": ("*.mask_emb", "*.r_s_bias", "*.seg_embed"),
    "fnet": ("fnet.pooler.*",),
    "layoutlm": ("layoutlm.pooler.*",),
    "squeezebert": ("transformer.pooler.*",),
    "led": ("*_global.*",),
    "phimoe": ("PhimoeMultiplier",),
}


def tiny_config(kind: str, **more: Any) -> Any:
    """A configuration of that model type with every size that it has made small."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[kind]().to_dict()
    return CONFIG_MAPPING[kind](**{name: size for name, size in SIZES.items() if name in known}, **more)


def language_model(kind: str, family: str) -> dict[str, Any]:
    """One step of language modelling on twenty-four tokens."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(kind)
    model = getattr(transformers, family).from_config(config).train()
    ids = torch.randint(3, 90, (2, 12))
    return given(lambda: model(input_ids=ids, labels=ids).loss, model, allow=UNUSED.get(kind, ()))


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "LoraConfig:dora": {"r": 4, "use_dora": True},
    "LoraConfig:rslora": {"r": 4, "use_rslora": True},
    "LoraConfig:dropout": {"r": 4, "lora_dropout": 0.1},
    "LoraConfig:head": {"r": 4, "modules_to_save": ["lm_head"]},
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFTConfig": {"boft_block_size": 4},
    "FourierFTConfig": {"n_frequency": 16},
    "HRAConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["input_layernorm", "norm"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 8, "r": 0},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 16},
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
}


def adapter(name: str) -> dict[str, Any]:
    """A tiny Qwen with one of peft's methods."""
    import peft
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    kind, options = getattr(peft, name.partition(":")[0]), dict(ADAPTERS[name])
    if not name.startswith(("Prompt", "Prefix")):
        options.setdefault("target_modules", ["q_proj", "v_proj"])
    base = Qwen2ForCausalLM(tiny_config("qwen2"))
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **options)).train()
    ids = torch.randint(3, 90, (2, 12))
    return given(lambda: model(input_ids=ids, labels=ids).loss, model)
