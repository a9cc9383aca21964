"""Every preset is a configuration; `seed` has the original recipe's numbers."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

from qwen_fused.cli.presets import PRESETS, preset
from qwen_fused.config import TrainConfig
from qwen_fused.loss.efe_loss import EFEWeights
from qwen_fused.qwen import memory


def test_names():
    assert set(PRESETS) == {"tiny", "qwen2.5-0.5b", "qwen2.5-1.5b-lora", "seed"}
    assert preset("tiny") == TrainConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_yaml(name, tmp_path):
    config = preset(name)
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == config


def test_what_the_names_promise():
    assert preset("qwen2.5-0.5b").qwen.endswith("Qwen2.5-0.5B") and preset("qwen2.5-0.5b").lora_rank == 0
    assert preset("qwen2.5-1.5b-lora").qwen.endswith("Qwen2.5-1.5B") and preset("qwen2.5-1.5b-lora").lora_rank > 0


def test_seed_has_the_original_numbers():
    config = preset("seed")
    assert config.weights == EFEWeights(ce=1, risk=1, ambiguity=0, agreement=0.5, anchor=0.2, prompt=0.3)
    assert (config.early_step_weight, config.reversibility, config.objective_share) == (0.1, 0.4, 0.7)
    assert (config.size_warmup, config.size_weight, config.hard_floor, config.hard_mode) == (0.6, 0.3, 0.5, "episode")
    assert (config.qwen_lr, config.agent_lr, config.policy_lr, config.weight_decay) == (5e-5, 1e-5, 5e-5, 1e-6)
    assert (config.policy_hidden, config.delta_scale, config.prompt_dim, config.clip) == (512, 0.2, 256, 1)
    assert (config.checkpoint_every, config.keep_checkpoints, config.log_every, config.epochs) == (50, 5, 50, 10)
    assert config.prompt_window == 10
    assert (config.dataset, config.qwen, config.pooling) == ("arc2", "Qwen/Qwen2.5-1.5B", "mean")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="^preset must be one of tiny, .*, got 'tinny'; did you mean tiny.$"):
        preset("tinny")


# of the published configurations
TRUE_SHAPES = {
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen2.5-1.5b-lora": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
}


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_one_card_of_24_gb_holds_it(name, tmp_path, monkeypatch):
    """At the true shape, on the meta device, with the longest prompts."""
    Qwen2Config(
        **TRUE_SHAPES[name], vocab_size=151_936, num_key_value_heads=2, max_position_embeddings=32_768,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = replace(preset(name), qwen=str(tmp_path))
    monkeypatch.setattr(memory, "available_memory", lambda device: 24 * 10**9)
    said = memory.check_memory(config, torch.device("cuda"))
    assert "Warning" not in said and f"weights {'1.8' if '0.5b' in name else '2.9'} GiB" in said
    assert ("its proof" in said) == config.prove
    # the claim is not an empty one: half the card is too little, or a proof of the larger one
    with_proof = memory.check_memory(replace(config, prove=True), torch.device("cuda"))
    assert ("Warning" in with_proof) == (not config.prove) and ("--no-prove" in with_proof) == (not config.prove)
    monkeypatch.setattr(memory, "available_memory", lambda device: 8 * 10**9)
    with contextlib.suppress(ValueError):
        assert "Warning" in memory.check_memory(config, torch.device("cuda"))
