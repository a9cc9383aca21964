"""The address of `MasterAdamW` before it was `qf.MasterAdamW`; kept for loops that import it from here."""

from qwen_fused.train.optimizer import MasterAdamW

__all__ = ["MasterAdamW"]
