"""Two processes end as one, with one exit code, whatever ends them and whichever of them sees it first."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import rows
from two_processes import run_ranks, said

from qwen_fused.cli import main as cli
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.train import loop
from qwen_fused.train.checkpoint import list_checkpoints
from qwen_fused.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("unevaluated")


@pytest.fixture
def go(small_config, tmp_path):
    """Keyword changes -> exit codes of two processes that train, and the first one's run folder."""

    def both(act, **changes) -> tuple[list[int], Path]:
        config = small_config(max_batches=6, **changes)
        config.save(tmp_path / "settings.yaml")

        def command(rank: int) -> int:
            act(rank)
            return cli.main(["train", "--config", str(tmp_path / "settings.yaml")])

        codes = run_ranks(command, tmp_path)
        # the second process leaves no folder
        (run,) = config.out.iterdir()
        return codes, run

    return both


def before_batch(number: int, act) -> None:
    """Do something as a batch begins, in this process."""
    trained = Trainer.train_step

    def acting(self, *args, **options):
        if self.progress.step == number - 1:
            act()
        return trained(self, *args, **options)

    Trainer.train_step = acting


def test_a_signal_that_the_second_alone_gets_ends_both_after_a_proof(go, tmp_path):
    def interrupt(rank):
        if rank == 1:
            before_batch(3, lambda: os.kill(os.getpid(), signal.SIGINT))

    codes, run = go(interrupt, prove=True)
    assert codes == [130, 130], said(tmp_path, 0) + said(tmp_path, 1)
    assert json.loads((run / "proof.json").read_text())["ok"]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000003.safetensors"]
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert "Interrupted after batch 3; to go on: qwen-fused train --resume" in (run / "train.log").read_text()
    assert "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)


def test_minutes_that_are_over_for_the_second_alone_end_both(go, tmp_path):
    def late(rank):
        if rank == 1:
            before_batch(2, lambda: setattr(loop.Clock, "is_over", lambda self: True))

    codes, run = go(late, max_minutes=1000)
    assert codes == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert "Stopping after 1000 minutes, at batch 2 of 6." in (run / "train.log").read_text()
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000002.safetensors"]


def test_a_proof_that_fails_ends_both_before_their_first_batch(go, tmp_path):
    def cut(rank):
        forward = QwenPrompt.forward

        def detached(self, demonstrations, pooled=None):
            out = forward(self, demonstrations, pooled)
            return replace(out, prompt=out.prompt.detach())

        QwenPrompt.forward = detached

    codes, run = go(cut, prove=True)
    assert codes == [1, 1], said(tmp_path, 0) + said(tmp_path, 1)
    for rank in range(2):
        assert said(tmp_path, rank).splitlines()[-1].endswith("--no-prove trains all the same"), rank
    assert not json.loads((run / "proof.json").read_text())["ok"]
    assert (run / "metrics.jsonl").read_text() == "" and not (run / "checkpoints").exists()
