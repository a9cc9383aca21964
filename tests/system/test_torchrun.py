"""The command line under torchrun: one run folder, the curve of one process, and any number of processes goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_fused.config import TrainConfig
from qwen_fused.train.loop import train
from qwen_fused.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def torchrun(config: TrainConfig, folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """`torchrun -m qwen_fused train` with a configuration; one thread each."""
    config.save(folder / "settings.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", "qwen_fused", "train", "--config", str(folder / "settings.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_then_one(small_config, tmp_path: Path) -> None:
    """Sharded, where every process must take part in every evaluation too; test_distributed.py has the other ways."""
    config = small_config(max_batches=5, batch_size=5, prompt_window=2, keep_checkpoints=2)
    done = torchrun(replace(config, max_batches=3, out=tmp_path / "two", shard_qwen=True), tmp_path)
    # the second process leaves nothing, and says nothing
    (folder,) = (tmp_path / "two").iterdir()
    assert done.stdout.count("Trainable parameters") == done.stdout.count("Report: ") == 1
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000003.safetensors"]
    assert (folder / "checkpoints" / "best.safetensors").exists() and (folder / "report.html").exists()
    # the checkpoint is in the middle of a window
    train(replace(config, resume=folder))
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    alone, expected = Trainer(config, tmp_path), []
    for index in range(5):
        pending = alone.train_step(alone.sampler.batch(0, index), 0, flush=alone.sampler.ends_window(index))
        expected.append(alone.read(pending))
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "efe", "policy_loss", "reward", "agent_grad", "prompt_grad", "mask_ratio", "accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (ours["step"], name)
        assert ours["qwen_grad"] == (theirs["qwen_grad"] and pytest.approx(theirs["qwen_grad"], rel=1e-5))
