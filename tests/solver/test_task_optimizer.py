"""Muon: singular values near 1, a stack as one by one, and the recurrence's matrices are its own."""

from __future__ import annotations

import torch

from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_optimizer import MATRICES, Muon, TaskOptimizer, orthogonalised


def test_singular_values_are_alike():
    torch.manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, dtype=torch.float64)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_a_stack_steps_as_its_matrices_do():
    torch.manual_seed(0)
    stack = torch.randn(3, 4, 6, dtype=torch.float64)
    alone = [matrix.clone().requires_grad_() for matrix in stack]
    stacked = stack.clone().requires_grad_()
    optimizers = [Muon([stacked], 0.1, 0.05), *(Muon([matrix], 0.1, 0.05) for matrix in alone)]
    for _ in range(3):
        gradient = torch.randn_like(stack)
        stacked.grad = gradient
        for matrix, own in zip(alone, gradient, strict=True):
            matrix.grad = own
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_every_parameter_has_one_optimizer():
    agent = GridAgent(channels=8, prompt_dim=4, steps=1)
    named = list(agent.named_parameters())
    optimizer = TaskOptimizer(named, SolveSettings())
    held = [[id(p) for g in o.param_groups for p in g["params"]] for o, _ in optimizer.optimizers]
    assert sorted(held[0] + held[1]) == sorted(id(p) for _, p in named)
    assert len(held[1]) == len(MATRICES)
    alone = TaskOptimizer(named, SolveSettings(matrix_lr=0.0))
    assert len(alone.optimizers) == 1
