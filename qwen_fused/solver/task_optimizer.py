"""What steps a task's weights: Muon for the matrices of the recurrence, AdamW for the rest.

Muon (Jordan et al. 2024) steps a matrix by its momentum with all singular values made alike, by Newton-Schulz steps.
A task is learned in some hundred steps, and these go further: docs/LOG.md. Every matrix may be a stack of matrices, one
per task; the rule is then each matrix's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen_fused.solver.settings import SolveSettings

# quintic whose fixed slope pulls singular values in (0, 1] to about 1 in five iterations
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.9
MATRIX_DECAY = 0.05
# AdamW's
BETAS = (0.9, 0.99)
EPSILON = 1e-8
MATRICES = ("core.look.weight", "core.mix", "core.film.weight", "core.update")


def orthogonalised(matrix: Tensor) -> Tensor:
    """Matrices [..., m, n] with their singular values near 1, in their own type."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = (x if wide else x.mT).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        # x <- a x + (b s + c s s) x of s = x x', the sums within the products
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; weight decay apart from it.

    Args:
        parameters: matrices [m, n], or stacks of them [..., m, n].
        lr: learning rate: the root mean square of a step is lr / sqrt(n), or lr / sqrt(m) where m < n.
        weight_decay: share of the weights taken away per unit of lr.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - MOMENTUM)
                step = orthogonalised(parameter.grad.lerp(mean, MOMENTUM))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


class TaskOptimizer:
    """Both, with one learning rate for each that a schedule scales.

    Args:
        named: the task's parameters by name; a name that ends as one of `MATRICES` is Muon's.
        settings: lr, matrix_lr and weight_decay.
        axes: leading axes of a stack, which do not count when matrices are told from vectors.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], settings: SolveSettings, axes: int = 0):
        chosen = [p for name, p in named if settings.matrix_lr and name.endswith(MATRICES)]
        ids = {id(p) for p in chosen}
        rest = [p for _, p in named if id(p) not in ids]
        decays = [p for p in rest if p.dim() > axes + 1]
        stays = [p for p in rest if p.dim() <= axes + 1]
        groups = [{"params": decays, "weight_decay": settings.weight_decay}, {"params": stays, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, eps=EPSILON, fused=True)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adam, settings.lr)]
        if chosen:
            self.optimizers.append((Muon(chosen, settings.matrix_lr, MATRIX_DECAY), settings.matrix_lr))

    def step(self, share: float) -> None:
        """Step with this share of the learning rates."""
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's."""
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
