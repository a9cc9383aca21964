"""Train Qwen through a planning agent: fused EFE loss, per-group gradient norms, and a run-time gradient proof.

    import qwen_fused as qf

Every part stands alone; nothing here imports transformers until it is used.
"""

from __future__ import annotations

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEOutput, EFEWeights, efe_loss
from qwen_fused.norms.group_grad_norm import GradStats, GroupGradNorm
from qwen_fused.proof.prove import ProofReport, prove
from qwen_fused.train.optimizer import MasterAdamW
from qwen_fused.window.prompt_window import PromptWindow

__version__ = "0.1.0"

__all__ = [
    "EFEOutput",
    "EFEWeights",
    "GradStats",
    "GroupGradNorm",
    "MasterAdamW",
    "PromptWindow",
    "ProofReport",
    "efe_loss",
    "hard_cell_cross_entropy",
    "prove",
]
