"""What a worker process is asked, as JSON and safetensors: a task without its answers, and what Qwen made of it.

Qwen stays with whoever asks: a worker holds the agent, a few megabytes, however large Qwen is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from qwen_fused.arc.symmetry import turn
from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.common.typed_yaml import from_plain
from qwen_fused.config import TrainConfig
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.planner.model import make_agent
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_planner import lines_agent


@dataclass(frozen=True, eq=False)
class Job:
    """What all questions have in common."""

    agent: nn.Module
    settings: SolveSettings

    @classmethod
    def from_bytes(cls, content: bytes) -> Job:
        """What `job_bytes` wrote."""
        head, _, tensors = content.partition(b"\n")
        plain = json.loads(head)
        agent = make_agent(from_plain(TrainConfig, plain["config"]))
        agent.load_state_dict(load(tensors))
        return cls(agent, SolveSettings(**plain["settings"]))


def job_bytes(planner: Any, settings: SolveSettings) -> bytes:
    """A `QwenPlanner`'s agent and the settings: a line of JSON, then safetensors.

    Raises:
        ValueError: the agent is that of runs before 0.3.
    """
    head = json.dumps({"config": planner.config.to_dict(), "settings": asdict(settings)})
    # clone: what shares memory is refused
    state = {name: tensor.detach().cpu().clone() for name, tensor in lines_agent(planner).state_dict().items()}
    return head.encode() + b"\n" + save(state)


@dataclass(frozen=True, eq=False)
class Question:
    """A task without its answers, and what Qwen made of its demonstrations through each symmetry."""

    task: Task
    prompts: np.ndarray  # [V, D] float32
    features: np.ndarray  # [V, 15] float32
    seconds: float | None = None
    """Until the time for all tasks ends; None: it does not."""

    def to_bytes(self) -> bytes:
        """As JSON; floats come back bit for bit."""
        train = [[grid.tolist() for grid in (pair.input, pair.output) if grid is not None] for pair in self.task.train]
        plain = {
            "id": self.task.id,
            "train": train,
            "test": [pair.input.tolist() for pair in self.task.test],
            "prompts": self.prompts.tolist(),
            "features": self.features.tolist(),
            "seconds": self.seconds,
        }
        return json.dumps(plain).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Question:
        """Inverse of `to_bytes`."""
        plain = json.loads(content)
        train = tuple(Pair(*(np.array(grid, np.uint8) for grid in pair)) for pair in plain["train"])
        test = tuple(Pair(np.array(grid, np.uint8), None) for grid in plain["test"])
        prompts, features = (np.array(plain[name], np.float32) for name in ("prompts", "features"))
        return cls(Task(plain["id"], train, test), prompts, features, plain["seconds"])


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts [V, D] and features [V, 15], as `QwenPrompt` gives them."""

    prompt: torch.Tensor
    features: torch.Tensor


class ReadPlanner:
    """Stands for the planner whose Qwen has read the demonstrations already."""

    def __init__(self, agent: nn.Module, question: Question):
        self.agent = agent
        self.encoded = Encoded(torch.from_numpy(question.prompts), torch.from_numpy(question.features))

    def prompt(self, demonstrations: Any) -> Encoded:
        """What Qwen made of the question's demonstrations."""
        return self.encoded


def make_question(planner: Any, task: Task, settings: SolveSettings) -> Question:
    """Have Qwen read a task's demonstrations through each symmetry.

    Args:
        planner: a `QwenPlanner`.
        task: its answers are left out of the question.
        settings: how many symmetries.
    """
    with evaluating(planner):
        encoded = planner.prompt([turned_pairs(task.train, symmetry) for symmetry in range(settings.symmetries)])
    return Question(without_answers(task), encoded.prompt.float().cpu().numpy(), encoded.features.float().cpu().numpy())


def turned_pairs(pairs: Sequence[Pair], symmetry: int) -> tuple[Pair, ...]:
    """Demonstrations through a symmetry."""
    return tuple(Pair(turn(p.input, symmetry), turn(p.output, symmetry)) for p in pairs)  # type: ignore[arg-type]


def without_answers(task: Task) -> Task:
    """The task as it is asked: no test pair has an output."""
    return Task(task.id, task.train, tuple(Pair(pair.input, None) for pair in task.test))
