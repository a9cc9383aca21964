"""Which agent a configuration means."""

from __future__ import annotations

from qwen_fused.config import TrainConfig
from qwen_fused.planner.agent import GridAgent
from qwen_fused.planner.conv_agent import ConvAgent


def make_agent(config: TrainConfig) -> GridAgent | ConvAgent:
    """The agent of a configuration, with weights from torch's generator."""
    agent = GridAgent if config.agent == "lines" else ConvAgent
    return agent(channels=config.agent_channels, prompt_dim=config.prompt_dim, steps=config.plan_steps)
