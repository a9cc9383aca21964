"""The gradient proof in tests: `qwen_fused.testing.assert_gradient(loss_fn, params)`."""

from __future__ import annotations

from qwen_fused.proof.assertion import assert_gradient

__all__ = ["assert_gradient"]
