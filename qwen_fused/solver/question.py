"""What a worker process is asked, as JSON and safetensors: a task without its answers, and what Qwen made of it.

Qwen stays with whoever asks: a worker holds the agent, a few megabytes, however large Qwen is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.common.typed_yaml import from_plain
from qwen_fused.config import TrainConfig
from qwen_fused.planner.evaluation_mode import evaluating
from qwen_fused.planner.make_agent import make_agent
from qwen_fused.solver.parts import narrowed
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_planner import encode_task, lines_agent


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
class Encoded:
    """Prompts [N, D] and features [N, 15] of N sets of demonstrations, as `QwenPrompt` gives them."""

    prompt: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True, eq=False)
class Question:
    """A task without its answers, and what Qwen made of its demonstrations."""

    task: Task
    encoded: tuple[Encoded, ...]
    """Of each time that `encode_task` has Qwen read, in order."""
    seconds: float | None = None
    """Until the time for all tasks ends; None: it does not."""

    @cached_property
    def shown(self) -> Task:
        """The task as a planner is shown it."""
        return narrowed(self.task)

    def to_bytes(self) -> bytes:
        """As JSON; floats come back bit for bit."""
        train = [[grid.tolist() for grid in (pair.input, pair.output) if grid is not None] for pair in self.task.train]
        plain = {
            "id": self.task.id,
            "train": train,
            "test": [pair.input.tolist() for pair in self.task.test],
            "encoded": [[encoded.prompt.tolist(), encoded.features.tolist()] for encoded in self.encoded],
            "seconds": self.seconds,
        }
        return json.dumps(plain).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Question:
        """Inverse of `to_bytes`."""
        plain = json.loads(content)
        train = tuple(Pair(*(np.array(grid, np.uint8) for grid in pair)) for pair in plain["train"])
        test = tuple(Pair(np.array(grid, np.uint8), None) for grid in plain["test"])
        encoded = tuple(Encoded(*(torch.tensor(rows, dtype=torch.float32) for rows in one)) for one in plain["encoded"])
        return cls(Task(plain["id"], train, test), encoded, plain["seconds"])


class ReadPlanner:
    """Stands for the planner whose Qwen has read the question already: `encode_task` gets what it got then."""

    def __init__(self, agent: nn.Module, question: Question):
        self.agent = agent
        self.encoded = iter(question.encoded)

    def prompt(self, demonstrations: Any) -> Encoded:
        """What Qwen made of them."""
        return next(self.encoded)


class ReadingPlanner:
    """Stands for the planner while its Qwen reads, and keeps what comes of it."""

    def __init__(self, planner: Any):
        self.planner = planner
        self.encoded: list[Encoded] = []

    def prompt(self, demonstrations: Any) -> Any:
        """Have Qwen read, in evaluation mode."""
        with evaluating(self.planner):
            encoded = self.planner.prompt(demonstrations)
        self.encoded.append(Encoded(encoded.prompt.float().cpu(), encoded.features.float().cpu()))
        return encoded


def make_question(planner: Any, task: Task, settings: SolveSettings) -> Question:
    """Have Qwen read what a worker needs of a task.

    Args:
        planner: a `QwenPlanner`.
        task: its answers are left out of the question.
        settings: how many symmetries.
    """
    question, reading = without_answers(task), ReadingPlanner(planner)
    encode_task(reading, question, settings.symmetries)  # type: ignore[arg-type]
    return Question(question, tuple(reading.encoded))


def without_answers(task: Task) -> Task:
    """The task as it is asked: no test pair has an output."""
    return Task(task.id, task.train, tuple(Pair(pair.input, None) for pair in task.test))
