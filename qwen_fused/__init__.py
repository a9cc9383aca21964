"""Train Qwen through a planning agent: fused EFE loss, per-group gradient norms, and a run-time gradient proof.

    import qwen_fused as qf

Every part stands alone; nothing here imports transformers until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen_fused.loss.efe_loss import EFEOutput, EFEWeights, efe_loss, hard_cell_cross_entropy
from qwen_fused.norms.group_grad_norm import GradStats, GroupGradNorm
from qwen_fused.proof.prove import ProofReport, prove
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.train.optimizer import MasterAdamW
from qwen_fused.window.prompt_window import PromptWindow

if TYPE_CHECKING:
    from qwen_fused.solver.solution import Solution
    from qwen_fused.train.solve_run import solve

__version__ = "0.1.0"

__all__ = [
    "EFEOutput",
    "EFEWeights",
    "GradStats",
    "GroupGradNorm",
    "MasterAdamW",
    "PromptWindow",
    "ProofReport",
    "Solution",
    "SolveSettings",
    "efe_loss",
    "hard_cell_cross_entropy",
    "prove",
    "solve",
]


def __getattr__(name: str) -> Any:
    """The names that need transformers, imported where they are used."""
    if name == "solve":
        from qwen_fused.train.solve_run import solve

        return solve
    if name == "Solution":
        from qwen_fused.solver.solution import Solution

        return Solution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
