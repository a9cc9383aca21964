"""How much memory Qwen's side of a run needs, from its config alone, and which flag to change when it is too much.

Nothing is loaded: the model is laid out on torch's meta device. Activations are counted per token and layer, as
autograd saves them for transformers' Qwen2 and Qwen3 layers under SDPA (measured with saved-tensor hooks).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from qwen_fused.config import TrainConfig
from qwen_fused.qwen.backbone import check_lora_rank, load_config
from qwen_fused.qwen.prompt_text import ADDED_TOKENS
from qwen_fused.qwen.tiny import byte_tokenizer, tiny_config

GIB = 1024**3

# (adapters, half precision) -> elements that a layer saves per token, per unit of: hidden width, queries' width,
# keys' width, intermediate width, and queries' and keys' width again where they are normalised (Qwen3). Frozen norms
# save less, norms in half precision keep float32 copies, and so do adapters on half-precision weights.
SAVED_WIDTHS = {
    (False, False): (6, 2, 2, 4, 2),
    (False, True): (8, 2, 2, 4, 3),
    (True, False): (4, 2, 2, 4, 1),
    (True, True): (14, 4, 2, 5, 2),
}
# what layers of other kinds save, as multiples of that, at most; measured at small shapes: 1.2 to 1.6 with routed
# experts, 3.0 to 4.7 with transformers' own torch for linear attention (Qwen3-Next, Qwen3.5)
EXPERTS, LINEAR_ATTENTION = 1.6, 4.7

# of each element, trained or frozen, for float64, kept values and gradients. Resident memory on a CPU, 41 M elements,
# above what a step takes: 22 bytes where all train in float32, 20 for adapters on bfloat16
PROOF_BYTES = 22


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that Qwen's side of a training step needs; the agent's side is not in it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    proof: int = 0
    """What proving the step takes besides weights, gradients and optimizer, before there are activations; 0 without."""

    @property
    def without_activations(self) -> int:
        """What is needed however short the prompts are."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the worst moment: in a step at the longest prompts, or in the proof."""
        return self.without_activations + max(self.activations, self.proof)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {format_bytes(getattr(self, name))}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        proof = f"; its proof {format_bytes(self.proof)} in place of the activations" if self.proof else ""
        return f"Qwen needs about {format_bytes(self.total)}: {parts}{proof}."


def format_bytes(count: int) -> str:
    """Bytes for people: "0.52 GiB", "13 GiB", "4.1 MiB"."""
    value, unit = (count / GIB, "GiB") if count >= GIB / 10 else (count * 1024 / GIB, "MiB")
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} {unit}"


def saved_per_token(config: PretrainedConfig, dtype: torch.dtype, lora_rank: int) -> int:
    """Bytes that one layer keeps of one token for the backward pass."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    inner = config.intermediate_size
    if getattr(config, "num_experts", 0):
        inner = config.moe_intermediate_size * config.num_experts_per_tok
    normalised = q + kv if config.model_type.startswith("qwen3") else 0
    widths = (config.hidden_size, q, kv, inner, normalised)
    kinds = getattr(config, "layer_types", None) or []
    more = LINEAR_ATTENTION if "linear_attention" in kinds else EXPERTS if getattr(config, "num_experts", 0) else 1.0
    counts = SAVED_WIDTHS[lora_rank > 0, dtype.itemsize == 2]
    # between an adapter's two factors there are seven times `rank` float32 numbers
    plain = sum(n * width for n, width in zip(counts, widths, strict=True)) * dtype.itemsize + 4 * 7 * lora_rank
    return int(more * plain)


def estimate_memory(
    qwen: str = "tiny",
    *,
    batch_size: int = 16,
    max_prompt_tokens: int = 512,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    retained_batches: int = 1,
    prove: bool = False,
) -> MemoryEstimate:
    """Estimate what Qwen's side of one training step needs, at the longest prompts.

    Args:
        qwen: as for `load_backbone`; only the config is read.
        batch_size: prompts per batch.
        max_prompt_tokens: tokens per prompt, padding included.
        lora_rank: above 0, only adapters have gradients and optimizer state, in float32.
        gradient_checkpointing: one hidden state per layer is kept, and one layer's activations at a time.
        dtype: of the weights. The optimizer, `MasterAdamW`, has 8 bytes per trained element in float32 and 12 in
            half precision, where it keeps float32 masters.
        attention: "eager" keeps every layer's attention weights, which grow with the square of the prompt.
        retained_batches: batches whose graphs are kept at once: the size of a `PromptWindow` in retain mode.
        prove: whether the step is proved first.

    Returns:
        The estimate in bytes.

    Raises:
        ValueError: as `load_backbone`.
    """
    config = tiny_config(len(byte_tokenizer(ADDED_TOKENS))) if qwen == "tiny" else load_config(qwen)
    check_lora_rank(lora_rank, config)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    elements = trained = weights // dtype.itemsize
    width = dtype.itemsize
    if lora_rank:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        trained, width = sum(lora_rank * (m.in_features + m.out_features) for m in linear), 4
        weights += trained * width
    tokens = batch_size * max_prompt_tokens * retained_batches
    layer = saved_per_token(config, dtype, lora_rank)
    if attention == "eager":
        # the softmax is float32, and rounded where the weights are
        layer += config.num_attention_heads * max_prompt_tokens * (6 if dtype.itemsize == 2 else 4)
    # the embedding's output and the last norm, unless they are frozen
    outside = 0 if lora_rank else (3 if dtype.itemsize == 2 else 2) * config.hidden_size * dtype.itemsize
    if gradient_checkpointing:
        kept = tokens * (config.num_hidden_layers * config.hidden_size * dtype.itemsize + outside)
        activations = kept + batch_size * max_prompt_tokens * layer
    else:
        activations = tokens * (config.num_hidden_layers * layer + outside)
    return MemoryEstimate(
        weights=weights,
        gradients=trained * width,
        optimizer=trained * (8 if width == 4 else 12),
        activations=activations,
        proof=PROOF_BYTES * elements if prove else 0,
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes free for a new run on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def advise(available: int, qwen: str = "tiny", **arguments: Any) -> str | None:
    """What to do when Qwen's side does not fit; None when it does.

    Args:
        available: bytes, as `available_memory` gives them.
        qwen: as for `estimate_memory`.
        **arguments: as for `estimate_memory`.

    Returns:
        One sentence that names the first single flag that helps, or the flags that help together.
    """
    estimate = estimate_memory(qwen, **arguments)
    if estimate.total <= available:
        return None
    batch = max(arguments.get("batch_size", 16) // 4, 1)
    measures: dict[str, dict[str, Any]] = {
        "--no-prove": dict(prove=False),
        "--attention sdpa": dict(attention="sdpa"),
        "--window-mode recompute": dict(retained_batches=1),
        "--gradient-checkpointing": dict(gradient_checkpointing=True),
        f"--batch-size {batch}": dict(batch_size=batch),
        "--lora-rank 16": dict(lora_rank=16),
        "--qwen-dtype bfloat16": dict(dtype=torch.bfloat16),
    }
    # what is on already does not help again
    if not arguments.get("prove"):
        del measures["--no-prove"]
    if arguments.get("attention", "sdpa") != "eager":
        del measures["--attention sdpa"]
    if arguments.get("retained_batches", 1) == 1:
        del measures["--window-mode recompute"]
    if arguments.get("lora_rank"):
        del measures["--lora-rank 16"]
    measures = {flag: new for flag, new in measures.items() if not new.items() <= arguments.items()}
    need = f"Qwen needs about {format_bytes(estimate.total)} and {format_bytes(available)} is free"
    together: dict = {}
    for flag, change in measures.items():
        if estimate_memory(qwen, **{**arguments, **change}).total <= available:
            return f"{need}: pass {flag}."
    for number, change in enumerate(measures.values(), start=1):
        together.update(change)
        if estimate_memory(qwen, **{**arguments, **together}).total <= available:
            return f"{need}: pass {' '.join(list(measures)[:number])}."
    tried = f"and {' '.join(measures)} would not be enough" if measures else "with every saving on"
    return f"{need}, {tried}: take a smaller --qwen."


def check_memory(config: TrainConfig, device: torch.device) -> str:
    """What to say of memory before a run's weights are loaded.

    Activations are an upper bound, as most prompts are shorter than `max_prompt_tokens`: a run that they may not fit
    is warned. Weights, gradients and optimizer state are certain: a run that has no room for them is refused.

    Returns:
        The estimate, and the flags to change where it is more than what is free.

    Raises:
        ValueError: the run cannot fit; the flags that help are named.
    """
    arguments = dict(
        batch_size=config.batch_size,
        max_prompt_tokens=config.prompt_tokens,
        lora_rank=config.lora_rank,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=getattr(torch, config.qwen_dtype),
        attention=config.attention,
        retained_batches=retained_batches(config),
        # a run that goes on is not proved again, and neither are shards
        prove=config.prove and config.resume is None and not config.shard_qwen,
    )
    estimate = estimate_memory(config.qwen, **arguments)
    available = available_memory(device)
    advice = None if available is None else advise(available, config.qwen, **arguments)
    if available is None or advice is None:
        return str(estimate)
    if estimate.without_activations > available:
        raise ValueError(f"not enough memory on {device} before any activation is kept: {advice}")
    return f"{estimate}\nWarning: on {device}, at the longest prompts, {advice}"


def retained_batches(config: TrainConfig) -> int:
    """Batches' worth of prompts whose graphs are kept at once: those of the window's pool in retain mode."""
    return max(1, -(-config.prompt_window // config.prompt_visits)) if config.window_mode == "retain" else 1
