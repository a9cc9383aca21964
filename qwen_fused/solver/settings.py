"""What test-time training depends on: one documented, validated, frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_fused.common.typed_yaml import check_types
from qwen_fused.config import require


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """Everything the answer to a task depends on besides the planner and the task."""

    steps: int = 150
    """Most training steps on a task's own demonstrations; 0 answers with the planner as it is."""
    batch: int = 8
    """Episodes of a step."""
    lr: float = 2e-3
    """AdamW's learning rate after the warm-up."""
    matrix_lr: float = 0.02
    """Muon's learning rate, for the recurrence's matrices; 0 leaves them to AdamW."""
    warmup: int = 10
    """Steps of linear warm-up."""
    final_lr: float = 0.1
    """Share of the learning rate at the last step, reached linearly."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """Largest gradient norm of a task."""
    average: float = 0.0
    """Decay of the moving average of the weights that answers; 0 answers with the last weights."""
    task_seconds: float | None = None
    """Stop training on a task after this many seconds of wall time; the schedule ends then too."""
    seed: int = 0
    """Seed of order and augmentation; with the task's id it decides everything."""
    symmetries: int = 8
    """Symmetries of the square that are trained on and vote: 8, or 1 for the grids as they are."""
    recolor: Literal["free", "all", "none"] = "free"
    """Colours permuted in training: those without a role of their own in the task, all but 0, or none."""
    recolored: float = 0.5
    """Share of the training episodes that are recoloured."""
    votes: int = 32
    """Views that vote on an answer: the symmetries first, then recoloured ones."""
    early_step_weight: float = 1.0
    """Cross-entropy weight of every planning step but the last."""
    size_weight: float = 0.3
    """Weight of the size loss beside the cells'; no size loss where the demonstrations' sizes follow a rule."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch", "lr", "clip", "votes"):
            require(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        for name in ("steps", "warmup", "seed", "weight_decay", "matrix_lr"):
            require(getattr(self, name) >= 0, name, "a number of at least 0", getattr(self, name))
        for name in ("final_lr", "average", "recolored", "early_step_weight", "size_weight"):
            require(0 <= getattr(self, name) <= 1, name, "a number in [0, 1]", getattr(self, name))
        require(self.symmetries in (1, 8), "symmetries", "1 or 8", self.symmetries)
        require(
            self.task_seconds is None or self.task_seconds > 0, "task_seconds", "a number above 0", self.task_seconds
        )
