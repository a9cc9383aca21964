"""The configuration survives a round trip through YAML and refuses what makes no sense, by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from qwen_fused.common.typed_yaml import from_plain
from qwen_fused.config import TrainConfig
from qwen_fused.loss.efe_loss import EFEWeights


def test_round_trip(tmp_path):
    config = TrainConfig(
        weights=EFEWeights(risk=0.25), out=tmp_path / "x", resume=Path("y"), max_minutes=1.5, qwen="some/folder"
    )
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_yaml_again_is_the_same_text(tmp_path):
    text = TrainConfig(qwen_lr=5e-5, max_batches=7).to_yaml()
    (tmp_path / "c.yaml").write_text(text)
    assert TrainConfig.load(tmp_path / "c.yaml").to_yaml() == text


def test_a_file_may_leave_keys_out(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nweights: {risk: 0.5}\n")
    base = TrainConfig(epochs=9, seed=4, weights=EFEWeights(ce=2.0))
    loaded = TrainConfig.load(tmp_path / "c.yaml", base)
    assert (loaded.epochs, loaded.seed) == (3, 4)
    # a nested key changes itself and leaves its neighbours
    assert loaded.weights == EFEWeights(ce=2.0, risk=0.5)
    assert TrainConfig.load(tmp_path / "c.yaml").seed == TrainConfig().seed


def test_settings_are_grouped_and_in_the_order_of_the_file():
    groups = [base for base in TrainConfig.__mro__[1:-1]]
    names = [list(vars(group)["__annotations__"]) for group in reversed(groups)]
    assert len(groups) >= 6 and all(2 <= len(group) <= 15 for group in names)
    # each setting in one group, none of TrainConfig's own
    assert sum(names, []) == list(TrainConfig().to_dict())
    assert (names[0][0], names[-1][0]) == ("dataset", "out")


def test_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="^bach_size is not a key of the configuration; did you mean batch_size.$"):
        from_plain(TrainConfig, {"bach_size": 3})


def test_file_and_key_are_named(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: three\n")
    with pytest.raises(ValueError, match="c.yaml: epochs must be a whole number, got 'three'$"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_a_number_beyond_every_float_is_no_finite_number(tmp_path):
    (tmp_path / "c.yaml").write_text(f"qwen_lr: 1{400 * '0'}\n")
    with pytest.raises(ValueError, match="c.yaml: qwen_lr must be a finite number, got 10"):
        TrainConfig.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("value", ["-1", "nan", ".inf"])
def test_a_weight_below_0_is_refused_with_its_file(value, tmp_path):
    (tmp_path / "c.yaml").write_text(f"weights: {{ce: {value}}}\n")
    with pytest.raises(ValueError, match=r"c.yaml: weights.ce must be a finite number"):
        TrainConfig.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("name, value", [("epochs", "3"), ("qwen_lr", True), ("out", "runs"), ("pooling", "max")])
def test_types_are_checked_on_construction(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        TrainConfig(**{name: value})


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
        ("val_fraction", -0.1),
        ("max_eval_tasks", 0),
        ("val_fraction", 1.0),
        ("hard_floor", 1.5),
        ("objective_share", -0.1),
        ("seed", -1),
        ("max_batches", 0),
        ("max_minutes", 0.0),
        ("start_minutes", 0.0),
        ("plan_steps", 0),
        ("agent_lr", float("nan")),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})
