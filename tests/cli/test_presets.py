"""Every preset is a configuration; `seed` has the original recipe's numbers."""

from __future__ import annotations

import pytest

from qwen_fused.cli.presets import PRESETS, preset
from qwen_fused.config import TrainConfig
from qwen_fused.loss.efe_loss import EFEWeights


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
