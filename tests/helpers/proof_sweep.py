"""Healthy loops by the hundred: transformers' architectures built tiny, peft's methods, torch's optimizers and losses.

Each entry is a name and a function that returns the arguments of `prove`; all of them must be proved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, adamw, given

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
Loop = tuple[str, str, Callable[[], dict[str, Any]]]


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


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    name: lambda params, name=name: getattr(torch.optim, name)(params, lr=1e-3)
    for name in ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
} | {
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD:nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam:amsgrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "AdamW:foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW:fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "AdamW:long": lambda params: torch.optim.AdamW(params, lr=0.3),
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-3),
}


def optimizer(name: str) -> dict[str, Any]:
    """A small network stepped by one of torch's optimizers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=name != "Muon"), nn.GELU(), nn.Linear(16, 3, bias=name != "Muon"))
    return given(lambda: F.cross_entropy(net(X), Y), net, OPTIMIZERS[name](list(net.parameters())))


T = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda out: F.cross_entropy(out, Y, label_smoothing=0.1),
    "nll": lambda out: F.nll_loss(out.log_softmax(1), Y),
    "mse": lambda out: F.mse_loss(out, T),
    "l1": lambda out: F.l1_loss(out, T),
    "smooth_l1": lambda out: F.smooth_l1_loss(out, T),
    "huber": lambda out: F.huber_loss(out, T),
    "bce": lambda out: F.binary_cross_entropy_with_logits(out, T.sigmoid()),
    "kl": lambda out: F.kl_div(out.log_softmax(1), T.softmax(1), reduction="batchmean"),
    "hinge": lambda out: F.multi_margin_loss(out, Y),
    "multilabel": lambda out: F.multilabel_soft_margin_loss(out, (T > 0).float()),
    "poisson": lambda out: F.poisson_nll_loss(out, T.abs()),
    "gaussian": lambda out: F.gaussian_nll_loss(out[:, :1], T[:, :1], F.softplus(out[:, 1:2]) + 0.1),
    "cosine": lambda out: F.cosine_embedding_loss(out, T, torch.ones(16)),
    "triplet": lambda out: F.triplet_margin_loss(out, T, T.flip(0)),
    "ctc": lambda out: F.ctc_loss(out.log_softmax(1)[:, None], torch.tensor([[1, 2, 1]]), [16], [3]),
    "focal": lambda out: ((1 - (p := out.log_softmax(1).gather(1, Y[:, None])).exp()) ** 2 * -p).mean(),
    "infonce": lambda out: F.cross_entropy(F.normalize(out) @ F.normalize(T).T / 0.1, torch.arange(16)),
    "logsumexp": lambda out: out.logsumexp(1).pow(2).mean(),
    "quantile": lambda out: torch.maximum(0.9 * (T - out), -0.1 * (T - out)).mean(),
    "sinkhorn": lambda out: torch.cdist(out, T).softmax(1).mul(torch.cdist(out, T)).sum(1).mean(),
}


def loss(name: str) -> dict[str, Any]:
    """A small network under one loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return given(lambda: LOSSES[name](net(X)), net)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "group_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 3)),
    "rms_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)),
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 3)),
    "rrelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 3)),
    "alpha_dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.ConvTranspose1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "orthogonal": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "bilinear": lambda: nn.Sequential(nn.Linear(8, 8), nn.GLU(), nn.Softmax(1), nn.Linear(4, 3)),
}


def layer(name: str) -> dict[str, Any]:
    """A classifier with one kind of layer in it."""
    torch.manual_seed(0)
    net = LAYERS[name]()
    return given(lambda: F.cross_entropy(net(X), Y), net, adamw(net))


def loops() -> list[Loop]:
    """All of them: name, library, and what builds it."""
    found: list[Loop] = []
    for family, kinds in (
        ("AutoModelForCausalLM", CAUSAL),
        ("AutoModelForMaskedLM", ENCODERS),
        ("AutoModelForSeq2SeqLM", SEQUENCES),
    ):
        found += [(f"{family}:{kind}", "transformers", lambda k=kind, f=family: language_model(k, f)) for kind in kinds]
    found += [(name, "peft", lambda n=name: adapter(n)) for name in ADAPTERS]
    for make, names in ((optimizer, OPTIMIZERS), (loss, LOSSES), (layer, LAYERS)):
        found += [(f"{make.__name__}:{name}", "torch", lambda n=name, m=make: m(n)) for name in names]
    return found
