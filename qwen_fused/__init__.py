"""Train Qwen through a planning agent: fused EFE loss, per-group gradient norms, and a run-time gradient proof."""

from __future__ import annotations

__version__ = "0.1.0"
