"""The configuration survives a round trip through YAML and refuses what makes no sense, by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from qwen_fused.config import TrainConfig
from qwen_fused.ops import EFEWeights


def test_round_trip(tmp_path):
    config = TrainConfig(
        weights=EFEWeights(risk=0.25), out=tmp_path / "x", resume=Path("y"), max_minutes=1.5, qwen="some/folder"
    )
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match="bach_size"):
        TrainConfig.from_dict({"bach_size": 3})


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().seed = 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("epochs", -1),
        ("qwen_lr", 0.0),
        ("clip", -1.0),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("hard_floor", 1.5),
        ("objective_share", -0.1),
        ("seed", -1),
        ("max_batches", 0),
        ("max_minutes", 0.0),
        ("plan_steps", 0),
        ("agent_lr", float("nan")),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})
