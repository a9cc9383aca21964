"""Causal attention over right-padded prompts, asked for in a way that makes no library read values on the host.

transformers builds a mask where it is given none, and for that looks whether the positions are those of several packed
texts: `.all()` of a tensor, on which a GPU's host waits in every pass. Told "no mask" for each type of layer, the dense
Qwens leave that out, and SDPA and flash attention take their causal kernels as they do without padding.
"""

from __future__ import annotations

from transformers import PretrainedConfig

# whose `forward` takes a mask for each type of layer, in transformers 4.57 (where nothing was read) and in every 5 so
# far; the mixtures of experts of either take none
BY_LAYER_TYPE = ("qwen2", "qwen3")


def causal_without_mask(config: PretrainedConfig, tokens: int) -> dict[str, None] | None:
    """The `attention_mask` for texts of that many tokens with their padding on the right.

    Args:
        config: of the backbone.
        tokens: length of the longest text.

    Returns:
        No mask for each type of layer; None, for which the model builds masks itself, where that would not be
        causal: eager attention knows no other way, and a sliding window that is shorter than the text is a mask.
    """
    if config.model_type not in BY_LAYER_TYPE or config._attn_implementation == "eager":
        return None
    kinds = set(config.layer_types)
    if "sliding_attention" in kinds and tokens >= config.sliding_window:
        return None
    return dict.fromkeys(kinds)
