"""The gradient proof in Lightning: `Trainer(callbacks=[qwen_fused.lightning.Prove()])`. Needs `pip install lightning`."""

from __future__ import annotations

from qwen_fused.proof.lightning_callback import Prove

__all__ = ["Prove"]
