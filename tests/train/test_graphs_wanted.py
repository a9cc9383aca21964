"""When the step is recorded as graphs, on which canvases, and what stands for CUDA's graphs in the tests."""

from __future__ import annotations

import pytest
import torch
from op_recorder import OpGraphs

from qwen_fused.parallel.processes import Ranks
from qwen_fused.train.graphed_step import SIDES, bucket_canvas, wants_graphs
from qwen_fused.train.trainer import Trainer


def test_several_processes_take_the_eager_step(small_config, tmp_path, device):
    trainer = Trainer(small_config(device=str(device)), tmp_path)
    trainer.device = torch.device("cuda")
    assert wants_graphs(trainer)
    trainer.ranks = Ranks(0, 2)
    assert not wants_graphs(trainer)


def test_auto_is_for_cuda_alone(small_config, tmp_path, device):
    trainer = Trainer(small_config(device=str(device)), tmp_path)
    assert (trainer.graphs is None) == (device.type == "cpu")
    assert Trainer(small_config(device=str(device), cuda_graphs="off"), tmp_path).graphs is None


def test_canvases_are_few_squares_that_hold_their_episodes():
    assert bucket_canvas([3, 7]) == (10, 10) and bucket_canvas([30]) == (30, 30) and bucket_canvas([1]) == (6, 6)
    assert {bucket_canvas([side])[0] for side in range(1, 31)} == set(SIDES)


def test_op_graphs_tells_what_a_graph_would_not_hold(device):
    graphs, x = OpGraphs(device), torch.ones(3, device=device)
    for body in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.randn_like(x)):
        with pytest.raises(AssertionError):
            graphs.record(body)
    number = [2.0]
    replay = graphs.record(lambda: x.add_(1) * number[0])
    assert x.tolist() == [1, 1, 1], "recording runs nothing"
    number[0] = 5.0
    assert replay().tolist() == [4, 4, 4] and replay().tolist() == [6, 6, 6]
