"""What steps the weights of many tasks: `TaskOptimizer`'s rules on stacks, and what changes from step to step a tensor.

A CUDA graph holds what it was captured with, so the learning rate and the count of steps are tensors here, and nothing
in a step is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.stacked import StackedPlanner
from qwen_fused.solver.task_optimizer import BETAS, EPSILON, MATRIX_DECAY, MOMENTUM, orthogonalised


class StackedOptimizer:
    """Muon for the matrices of the recurrence, AdamW for the rest, and the moving average of all.

    Args:
        stacked: what is stepped; its gradients are there.
        settings: lr, matrix_lr, weight_decay and average.
    """

    def __init__(self, stacked: StackedPlanner, settings: SolveSettings):
        self.settings = settings
        self.adam = [(stacked.decays, settings.weight_decay), (stacked.stays, 0.0)]
        self.matrices = list(stacked.matrices)
        self.parameters: list[Tensor] = list(stacked.stacks)
        self.start = [p.detach().clone() for p in self.parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p, _ in self.adam]
        self.means = [p.clone() for p in self.start] if settings.average else []

        def number() -> Tensor:
            return torch.zeros((), dtype=torch.float64, device=stacked.prompts.device)

        self.share, self.average_share, self.steps = number(), number(), number()

    def schedule(self, step: int, share: float) -> None:
        """Say what the next step is; outside of a graph.

        Args:
            step: from 0.
            share: of the learning rates.
        """
        self.share.fill_(share)
        # early on the average is over fewer
        self.average_share.fill_(1 - min(self.settings.average, (1 + step) / (10 + step)))

    @torch.no_grad()
    def step(self) -> None:
        """Step every stack by its gradient."""
        self.steps += 1
        lr = self.share * self.settings.lr
        corrections = [1 - beta**self.steps for beta in BETAS]
        for (parameter, decay), first, second in zip(self.adam, self.first, self.second, strict=False):
            grad = parameter.grad
            assert grad is not None
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            if decay:
                parameter.mul_(1 - lr * decay)
            size = (second / corrections[1]).sqrt_().add_(EPSILON)
            parameter.sub_((first / size).mul_(lr / corrections[0]))
        lr = self.share * self.settings.matrix_lr
        for parameter, first in zip(self.matrices, self.first[len(self.adam) :], strict=True):
            grad = parameter.grad
            assert grad is not None
            first.lerp_(grad, 1 - MOMENTUM)
            rows, columns = parameter.shape[-2:]
            parameter.mul_(1 - lr * MATRIX_DECAY)
            step = orthogonalised(grad.lerp(first, MOMENTUM))
            parameter.sub_(step.mul_(lr * max(1.0, rows / columns) ** 0.5))
        for mean, weights in zip(self.means, self.parameters, strict=False):
            mean.add_((weights - mean).mul_(self.average_share))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to before the first step."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.copy_(start)
        for mean, start in zip(self.means, self.start, strict=False):
            mean.copy_(start)
        for state in (*self.first, *self.second, self.steps):
            state.zero_()

    @torch.no_grad()
    def swap_in(self) -> None:
        """Give the stacks their moving average, where there is one."""
        for parameter, mean in zip(self.parameters, self.means, strict=False):
            parameter.copy_(mean)
