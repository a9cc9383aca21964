"""The gradient proof in Lightning, which must be installed: `Trainer(callbacks=[qwen_fused.lightning.Prove()])`."""

from __future__ import annotations

from qwen_fused.proof.lightning_callback import Prove

__all__ = ["Prove"]
