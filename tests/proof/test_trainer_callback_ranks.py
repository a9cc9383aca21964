"""A proof in two processes: each judges its own gradient, and what a callback finds in one stops both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from proof_cases import marked
from small_loops import weights
from test_trainer_callback import trainer_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


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


class TwoHeads(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.between(self, self.body(x).relu())


def unused(net, hidden):
    return net.head(hidden)


def summed(net, hidden):
    scores = net.head(hidden)
    dist.all_reduce(scores)  # here
    return scores + net.spare(hidden)


def gathered(net, hidden):
    everyone = [torch.zeros_like(hidden) for _ in range(2)]
    dist.all_gather(everyone, hidden)
    everyone[dist.get_rank()] = hidden
    return net.head(torch.cat(everyone)).chunk(2)[dist.get_rank()] + net.spare(hidden)


def proof_of(between) -> qf.ProofReport:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = DistributedDataParallel(TwoHeads(between))
    # what one process sees is nothing like what the other does
    torch.manual_seed(dist.get_rank())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    report = qf.prove(lambda: F.cross_entropy(net(x), y), net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    print(report)
    dist.destroy_process_group()
    return report


@alone
def test_head_that_nobody_uses_is_named_by_both(tmp_path) -> None:
    def judge(rank: int) -> int:
        (finding,) = proof_of(unused).findings
        return (
            0
            if finding.kind == "unused" and set(finding.parameters) == {"module.spare.weight", "module.spare.bias"}
            else 1
        )

    assert run_ranks(judge, tmp_path) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)


@alone
@pytest.mark.parametrize("between", [summed, gathered])
def test_exchange_in_the_loss_keeps_nobody_waiting(tmp_path, between) -> None:
    def judge(rank: int) -> int:
        report = proof_of(between)
        found = [(f.kind, f.line) for f in report.findings]
        expected = [("collective in place", marked(summed))] if between is summed else []
        return 0 if report.verdict == "not proved" and found == expected else 1

    assert run_ranks(judge, tmp_path) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
