"""Configurations by name, for `--preset`: each a few settings over the defaults of TrainConfig."""

from __future__ import annotations

from typing import Any

from qwen_fused.common.typed_yaml import from_plain, nearest
from qwen_fused.config import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    # the defaults: what learns most per minute on two CPU cores
    "tiny": {"qwen": "tiny"},
    # every weight of the 0.5B trains: 19 GB with its proof, which one 24 GB card holds
    "qwen2.5-0.5b": {
        "qwen": "Qwen/Qwen2.5-0.5B",
        "precision": "bf16",
        "gradient_checkpointing": True,
        # the graphs of a window's prompts would be many times the weights
        "window_mode": "recompute",
        "qwen_lr": 2e-5,
        "warmup_batches": 100,
    },
    # frozen bf16 weights of the 1.5B under fp32 adapters: one 24 GB card, without the proof's 34 GB
    "qwen2.5-1.5b-lora": {
        "prove": False,
        "qwen": "Qwen/Qwen2.5-1.5B",
        "qwen_dtype": "bfloat16",
        "precision": "bf16",
        "lora_rank": 16,
        "gradient_checkpointing": True,
        # the graphs of a window's prompts would be many times the weights
        "window_mode": "recompute",
        "qwen_lr": 1e-4,
        "warmup_batches": 100,
    },
    # the original recipe's numbers: one episode a batch, no augmentation, the risk term at full weight. Its agent
    # trained at half the rate of its solver; here both are one module, at the agent's rate.
    "seed": {
        "dataset": "arc2",
        "qwen": "Qwen/Qwen2.5-1.5B",
        "pooling": "mean",
        "prompt_window": 10,
        "prompt_dim": 256,
        "batch_size": 1,
        "augment": 0.0,
        "epochs": 10,
        "agent_channels": 64,
        "plan_steps": 5,
        "policy_hidden": 512,
        "delta_scale": 0.2,
        "weights": {"ce": 1.0, "risk": 1.0, "ambiguity": 0.0, "agreement": 0.5, "anchor": 0.2, "prompt": 0.3},
        "early_step_weight": 0.1,
        "reversibility": 0.4,
        "hard_floor": 0.5,
        "hard_mode": "episode",
        "objective_share": 0.7,
        "size_warmup": 0.6,
        "size_weight": 0.3,
        "qwen_lr": 5e-5,
        "agent_lr": 1e-5,
        "policy_lr": 5e-5,
        "weight_decay": 1e-6,
        "clip": 1.0,
        "warmup_batches": 0,
        "final_lr": 1.0,
        "log_every": 50,
        "checkpoint_every": 50,
        "keep_checkpoints": 5,
    },
}


def preset(name: str) -> TrainConfig:
    """The configuration of that name.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}")
    return from_plain(TrainConfig, PRESETS[name])
