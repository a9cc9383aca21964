"""Train Qwen through a planning agent: fused EFE loss, per-group gradient norms, and a run-time gradient proof.

    import qwen_fused as qf

Every part stands alone; nothing here imports transformers or lightning until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEOutput, EFEWeights, efe_loss
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import GradStats
from qwen_fused.proof.gradient_error import GradientError
from qwen_fused.proof.prove import ProofReport, prove
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.train.optimizer import MasterAdamW
from qwen_fused.window.prompt_window import PromptWindow

if TYPE_CHECKING:
    from qwen_fused import lightning as lightning
    from qwen_fused import testing as testing
    from qwen_fused.proof.trainer_callback import ProveCallback
    from qwen_fused.solver.solution import Solution
    from qwen_fused.train.solve_run import solve

__version__ = "0.9.0"

__all__ = [
    "EFEOutput",
    "EFEWeights",
    "GradStats",
    "GradientError",
    "GroupGradNorm",
    "MasterAdamW",
    "PromptWindow",
    "ProofReport",
    "ProveCallback",
    "Solution",
    "SolveSettings",
    "efe_loss",
    "hard_cell_cross_entropy",
    "prove",
    "solve",
]

# name -> module that has it; imported when it is first asked for
_LATER = {
    "ProveCallback": "qwen_fused.proof.trainer_callback",
    "Solution": "qwen_fused.solver.solution",
    "solve": "qwen_fused.train.solve_run",
}
_MODULES = ("lightning", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"qwen_fused.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES})
