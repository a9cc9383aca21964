"""ProveCallback in two processes: each judges its own gradient, and what one finds stops both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from proof_cases import marked
from small_loops import weights
from test_trainer_callback import trainer_of
from transformers import Trainer
from two_processes import run_ranks, said

import qwen_fused as qf

pytest.importorskip("accelerate")

# the two processes are copies of their parent: they wait for ever where an earlier test of it has left OpenMP threads
ALONE = "QWEN_FUSED_TESTS_ALONE"
alone = pytest.mark.skipif(os.environ.get(ALONE) != "1", reason="run by test_in_a_process_of_its_own")


def test_in_a_process_of_its_own() -> None:
    if os.environ.get(ALONE) == "1":
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


class DetachedInOne(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model.module.model(inputs["input_ids"]).last_hidden_state
        if self.args.process_index == 1:
            hidden = hidden.detach()  # here
        return F.cross_entropy(model.module.lm_head(hidden).flatten(0, 1), inputs["labels"].flatten())


def begin() -> None:
    from accelerate.state import AcceleratorState, GradientState

    # what an earlier test of the parent left
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@alone
def test_healthy_run_goes_on_as_without(tmp_path) -> None:
    def train(rank: int) -> int:
        begin()
        ends = []
        for callbacks in ([], [qf.ProveCallback()]):
            trainer = trainer_of(tmp_path, callbacks=callbacks, gradient_accumulation_steps=2)
            trainer.train()
            ends.append(weights(trainer.model))
        print(callbacks[0].report)
        return 0 if torch.equal(*ends) and trainer.args.world_size == 2 and callbacks[0].report.ok else 1

    assert run_ranks(train, tmp_path) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)


@alone
def test_both_stop_at_what_one_finds(tmp_path) -> None:
    def train(rank: int) -> int:
        begin()
        trainer = trainer_of(tmp_path, DetachedInOne, [qf.ProveCallback()])
        try:
            trainer.train()
        except qf.GradientError as stopped:
            print(stopped)
            return 3 if trainer.state.global_step == 0 else 1
        return 0

    assert run_ranks(train, tmp_path) == [3, 3], said(tmp_path, 0) + said(tmp_path, 1)
    line = f"test_trainer_callback_ranks.py:{marked(DetachedInOne.compute_loss)} in"
    assert line in said(tmp_path, 1) and line not in said(tmp_path, 0)
    assert "another process" in said(tmp_path, 0)
