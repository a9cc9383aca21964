"""The Hugging Face Trainer example: its norms are Trainer's own, it clips, it learns, and it stops at a NaN by name."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hf_trainer_grad_norm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("hf_trainer_grad_norm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_logs_and_learns(example, tmp_path: Path) -> None:
    trainer = example.train(str(tmp_path), clip=None, steps=20)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert entry["grad_norm/model"] == pytest.approx(float(entry["grad_norm"]), rel=1e-5)
        parts = [entry[f"grad_norm/{part}"] for part in ("layers.0", "layers.1", "layers.2", "rest")]
        assert math.hypot(*parts) == pytest.approx(entry["grad_norm/model"], rel=1e-5)
    assert float(logged[-1]["loss"]) < 0.8 * float(logged[0]["loss"])


def test_clips(example, tmp_path: Path) -> None:
    trainer = example.train(str(tmp_path), clip=0.25, steps=10)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            assert entry["grad_norm/model"] > 0.5
            # Trainer measures once more, after the clip
            assert float(entry["grad_norm"]) == pytest.approx(0.25, rel=1e-4)


def test_stops_at_a_nan_by_name(example, tmp_path: Path, monkeypatch) -> None:
    small_qwen = example.small_qwen

    def poisoned():
        model = small_qwen()
        model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
        return model

    monkeypatch.setattr(example, "small_qwen", poisoned)
    with pytest.raises(FloatingPointError, match=r"in group model, first in model\.layers\.1\.mlp\.up_proj\.weight"):
        example.train(str(tmp_path), steps=3)
