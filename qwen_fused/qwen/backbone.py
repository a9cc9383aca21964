"""Find, check and load the one Qwen backbone of a run: tiny, a local folder, or a name on the hub."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from qwen_fused.common.device import out_of_memory
from qwen_fused.qwen.tiny import seeded, tiny_qwen

FAMILIES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
SAMPLE_TEXT = "in:\n0123456789\n"

# scale of the random second LoRA matrix. Zero, peft's default, would give the first matrix a zero gradient in
# the first step; this leaves the backbone's function unchanged to about a part in a thousand.
LORA_INIT_STD = 1e-3


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Let a library's logger pass errors only, for a while."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _source(qwen: str) -> tuple[str, bool]:
    """Where to load from, and whether that is a folder on this machine."""
    path = Path(qwen).expanduser()
    if qwen and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"qwen must be a folder with a saved Qwen, got {qwen!r}, which has no config.json")
        # absolute: saved adapters name their base by it, wherever they are loaded
        return str(path.resolve()), True
    # a hub name is OWNER/NAME or NAME: everything else can only have been meant as a path
    if path.exists() or path.is_absolute() or qwen.startswith(("~", ".")) or qwen.count("/") > 1 or not qwen:
        raise ValueError(f'qwen must be "tiny", a folder with a saved Qwen or a hub name, got no folder at {qwen!r}')
    return qwen, False


def check_attention(attention: str) -> None:
    """Refuse in one sentence an attention implementation that does not exist, or not on this machine."""
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "attention flash_attention_2 needs a CUDA device and the package flash-attn, which are not both here: "
            "pass --attention sdpa"
        )


def load_config(qwen: str) -> PretrainedConfig:
    """The config of a saved or published Qwen; refuses other families in one sentence."""
    source, local = _source(qwen)
    try:
        # the client retries for half a minute and reports each attempt: the sentence below says it once
        with quiet("huggingface_hub"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # hub clients raise their own families of errors, over HTTP libraries that differ between versions
    except Exception as error:
        if local:
            raise ValueError(f"qwen: the config.json in {qwen!r} cannot be read ({_first_line(error)})") from None
        raise ValueError(
            f"qwen: {qwen!r} is neither a folder here nor a model that the hub gives us: check the name "
            f'and the network, pass the path of a downloaded folder, or use "tiny", which needs no download'
        ) from None
    if getattr(config, "auto_map", None):
        raise ValueError(f"qwen: {qwen!r} asks for code of its own (auto_map in config.json), which is never run")
    if quantization := getattr(config, "quantization_config", None):
        # docs/LOG.md: neither a checkpoint nor the proof's float64 takes 4-bit weights
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"qwen: the weights in {qwen!r} are quantized ({method or 'by an unnamed method'}), which neither the "
            "proof nor a checkpoint takes: pass the Qwen that they were made from; --lora-rank with --qwen-dtype "
            "bfloat16 saves memory"
        )
    if config.model_type not in FAMILIES:
        # Qwen3.5 as published, and Qwen-VL: a text model beside one for pictures
        text = getattr(config.get_text_config(), "model_type", None)
        alone = f"; its text model is {text!r}: save it alone, with the tokenizer" if text in FAMILIES else ""
        known = ", ".join(FAMILIES)
        raise ValueError(f"qwen must be one of the types {known}, got {config.model_type!r} in {qwen!r}{alone}")
    return config


def _load_pretrained(qwen: str, dtype: torch.dtype, attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = load_config(qwen)
    source, _ = _source(qwen)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # a wrong value in its files may show at the first text only
        spelt = tokenizer.decode(tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"])
    except Exception as error:
        raise ValueError(f"qwen: {qwen!r} has no tokenizer that loads ({_first_line(error)})") from None
    if tokenizer.init_kwargs.get("auto_map"):
        raise ValueError(f"qwen: the tokenizer in {qwen!r} asks for code of its own (auto_map), which is never run")
    # without its files a tokenizer may load all the same, and know nothing but its special tokens
    if spelt != SAMPLE_TEXT:
        raise ValueError(f"qwen: the tokenizer in {qwen!r} cannot spell a grid: are its files all there?")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"qwen: the tokenizer in {qwen!r} has {len(tokenizer)} tokens, more than the {config.vocab_size} "
            f"of the model's vocabulary: they do not belong together"
        )
    try:
        # the report would say that the language-model head is left out, which is meant; gaps are told below
        with quiet("transformers"):
            model, loading = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                # a pytorch_model.bin is a pickle
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        # nothing is wrong with these weights
        if out_of_memory(error):
            raise
        raise ValueError(f"qwen: the weights in {qwen!r} do not load ({_first_line(error)})") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"qwen: the weights in {qwen!r} lack {len(missing)} tensors, {missing[0]} among them")
    return model, tokenizer


def enable_checkpointing(backbone: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Keep one activation per layer and recompute the rest in the backward pass, by whichever name this version has."""
    # transformers 5.24 renames gradient_checkpointing_enable
    new = hasattr(backbone, "activation_checkpointing_enable")
    enable = backbone.activation_checkpointing_enable if new else backbone.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def check_lora_rank(rank: int, config: PretrainedConfig) -> None:
    """Refuse a rank above the hidden width, which would keep the machine busy for minutes and gain nothing."""
    if not 0 <= rank <= config.hidden_size:
        raise ValueError(f"lora_rank must be from 0 to {config.hidden_size}, the width of this Qwen, got {rank}")


def add_lora(backbone: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze `backbone` and put trainable low-rank adapters on its linear layers, both factors non-zero.

    Raises:
        ValueError: the rank is more than the backbone is wide, where an adapter has more than the weight it adapts.
    """
    check_lora_rank(rank, backbone.config)
    # the task lets peft's Auto classes load the saved adapters
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="FEATURE_EXTRACTION",
    )
    with warnings.catch_warnings():
        # peft asks by a name that transformers gives up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(backbone, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=LORA_INIT_STD)
    return adapted


def load_backbone(
    qwen: str = "tiny",
    *,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    added_tokens: Sequence[str] = (),
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a Qwen backbone (no language-model head) and its tokenizer, ready to train.

    Args:
        qwen: "tiny", a folder written by `save_pretrained`, or a hub name. Code from the model's repository
            is never run.
        lora_rank: 0 trains every weight; above, only LoRA adapters of this rank on every linear layer.
        gradient_checkpointing: keep one activation per layer and recompute the rest in the backward pass.
        dtype: of the backbone's weights; adapters on half-precision weights are kept in float32.
        attention: transformers' attention implementation, one of ATTENTION.
        seed: of the tiny weights and of the adapters; the global generators are not moved.
        added_tokens: for "tiny", texts that are one token each.

    Returns:
        The backbone in train mode and the tokenizer.

    Raises:
        ValueError: one sentence: nothing at that path, no such name or no network, not one of FAMILIES, weights
            or tokenizer missing, an attention that this machine does not have.
    """
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 or more, got {lora_rank}")
    check_attention(attention)
    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if qwen == "tiny":
        backbone, tokenizer = tiny_qwen(seed, added_tokens=added_tokens, dtype=dtype, attention=attention)
    else:
        with seeded(seed):
            backbone, tokenizer = _load_pretrained(qwen, dtype, attention)
    if gradient_checkpointing:
        enable_checkpointing(backbone)
    adapted: PreTrainedModel | PeftModel = backbone
    if lora_rank:
        with seeded(seed):
            adapted = add_lora(backbone, lora_rank)
    # from_pretrained hands models out in eval mode
    return adapted.train(), tokenizer


def with_head(backbone: PreTrainedModel, qwen: str) -> PreTrainedModel | None:
    """A causal model of a trained backbone and the language-model head that its base has in weights of its own.

    None where there is none: the head is tied to the embedding, and follows from the backbone, or `qwen` has no head.
    """
    if qwen == "tiny" or backbone.config.tie_word_embeddings:
        return None
    source, _ = _source(qwen)
    with quiet("transformers"):
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=backbone.dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    model, loading = found
    if any(name.startswith("lm_head") for name in loading["missing_keys"]):
        return None
    setattr(model, model.base_model_prefix, backbone)
    return model


def save_backbone(
    backbone: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    head_of: str = "tiny",
) -> bool:
    """Save a trained backbone for plain transformers, or its LoRA adapters for plain peft, and the tokenizer.

    Adapters name the base that they belong to; the tiny Qwen, which is nowhere else, is saved beside them.

    Args:
        backbone: as `load_backbone` gives it.
        tokenizer: likewise.
        folder: made if missing.
        head_of: Qwen that the backbone was loaded from, whose untied language-model head is saved too.

    Returns:
        Whether a language model can be loaded from there: its head is saved, tied, or in the adapters' base.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    if not isinstance(backbone, PeftModel):
        whole = with_head(backbone, head_of)
        (backbone if whole is None else whole).save_pretrained(str(folder))
        return whole is not None or backbone.config.tie_word_embeddings
    if backbone.active_peft_config.base_model_name_or_path:
        backbone.save_pretrained(str(folder))
        return True
    config = backbone.active_peft_config
    base: Any = backbone.get_base_model()
    plain = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    base.save_pretrained(folder / "base", state_dict=plain)
    tokenizer.save_pretrained(folder / "base")
    config.base_model_name_or_path = str((folder / "base").resolve())
    try:
        backbone.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path = ""
    return False
