"""A run that is killed and continued is the run that was never killed, wherever the kill came."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import fork, rows
from soak import only_run, unequal

from qwen_fused.common import files
from qwen_fused.config import TrainConfig
from qwen_fused.report import run_log
from qwen_fused.train import checkpoint, loop
from qwen_fused.train.checkpoint import list_checkpoints, read_state

BATCHES = 10
SETTINGS = dict(max_batches=BATCHES, checkpoint_every=3, log_every=2)


def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_file(config: TrainConfig) -> None:
    files.atomic_replace = killed
    TrainConfig.save = killed


def in_the_middle_of_a_row(config: TrainConfig) -> None:
    metrics_of = run_log.RunLog.metrics

    def half(self, metrics):
        if metrics["step"] < 7:
            return metrics_of(self, metrics)
        self._metrics._file.write('{"step": 7, "epoch"')
        self._metrics._file.flush()
        killed()

    run_log.RunLog.metrics = half


def in_the_middle_of_a_checkpoint(config: TrainConfig) -> None:
    save_file = checkpoint.save_file

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "step-000006" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            killed()

    checkpoint.save_file = half


def before_a_checkpoint_has_its_name(config: TrainConfig) -> None:
    rename = os.replace
    os.replace = lambda old, new: killed() if "step-000006" in str(new) else rename(old, new)


def between_checkpoint_and_evaluation(config: TrainConfig) -> None:
    loop.finish = killed


POINTS = {
    before_the_first_file: None,
    in_the_middle_of_a_row: 6,
    in_the_middle_of_a_checkpoint: 3,
    before_a_checkpoint_has_its_name: 3,
    between_checkpoint_and_evaluation: 10,
}


@pytest.fixture
def config(small_config) -> TrainConfig:
    return small_config(**SETTINGS)


def run(config: TrainConfig, output: Path, fault=None) -> int:
    """Train in a process of its own, without the evaluation at the end, and with a fault; returns its exit code."""

    def call() -> int:
        loop.finish = lambda *args: None
        if fault is not None:
            fault(config)
        loop.train(config)
        return 0

    return os.waitstatus_to_exitcode(os.waitpid(fork(call, output), 0)[1])


def assert_same_run(one: Path, other: Path) -> None:
    assert [row["step"] for row in rows(other)] == list(range(1, BATCHES + 1))
    assert rows(one) == rows(other)
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (one, other)]
    assert last[0].name == last[1].name
    assert unequal(*map(read_state, last)) is None
    assert not list(other.rglob(".partial-*"))


@pytest.fixture(scope="module")
def unbroken(config_in, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(config_in(folder, **SETTINGS), folder / "output.txt") == 0
    return only_run(folder)


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_continued_is_unbroken(config, tmp_path, unbroken, point):
    output, last = tmp_path / "output.txt", POINTS[point]
    assert run(config, output, point) == -signal.SIGKILL, output.read_text()
    folder = only_run(config.out)
    if last is None:
        assert folder is None
        return
    assert read_state(list_checkpoints(folder / "checkpoints")[-1])["progress"]["step"] == last
    assert run(replace(config, resume=folder), output) == 0, output.read_text()
    assert_same_run(unbroken, folder)


def test_killed_before_its_first_checkpoint_starts_again_in_its_folder(config, tmp_path, unbroken):
    def early(config):
        trained = loop.Trainer.train_step
        loop.Trainer.train_step = lambda self, *a, **k: killed() if self.progress.step == 2 else trained(self, *a, **k)

    output = tmp_path / "output.txt"
    assert run(config, output, early) == -signal.SIGKILL
    folder = only_run(config.out)
    assert run(replace(config, resume=folder), output) == 0, output.read_text()
    assert "no checkpoint yet: starting at its first batch" in (folder / "train.log").read_text()
    assert_same_run(unbroken, folder)


def test_killed_while_it_cuts_rows_loses_none(config, tmp_path, unbroken):
    output = tmp_path / "output.txt"
    assert run(config, output, in_the_middle_of_a_row) == -signal.SIGKILL
    folder = only_run(config.out)

    def cutting(config):
        def half(path, content):
            with files.atomic_replace(path) as partial:
                partial.write_bytes(content[: len(content) // 2])
                killed()

        run_log.write_atomic = half

    assert run(replace(config, resume=folder), output, cutting) == -signal.SIGKILL
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 7
    assert run(replace(config, resume=folder), output) == 0, output.read_text()
    assert_same_run(unbroken, folder)


def test_soak():
    """Five kills at random moments, as the soak script does a hundred."""
    script = Path(__file__).resolve().parents[1] / "helpers" / "soak.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "5", "--batches", "16"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = done.stdout.splitlines()[-1]
    assert re.match(r"5 kills \(.*\), \d+ resumes, \d+ run\(s\) of 16 batches: .* equal bit for bit", figures), figures


def test_soak_sees_one_bit():
    import torch

    one, other = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])
    assert unequal({"a": [one, 1]}, {"a": [other, 1]}) is None
    other.view(torch.int32)[0] ^= 1
    assert unequal({"a": [one, 1]}, {"a": [other, 1]}) == ":/a/0"
    assert unequal({"a": 1}, {"b": 1}) and unequal({"a": 1}, {"a": 1.0}) and unequal([1], [1, 2])
