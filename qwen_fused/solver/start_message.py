"""What the process of a start and its workers say to each other: a line of JSON, then safetensors, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from qwen_fused.arc.tasks import Pair, Task
from qwen_fused.solver.start_training import Drawn, Trained


@dataclass(frozen=True, eq=False)
class Asked:
    """A training to do: the start as it is, a task without its test pairs, and what Qwen made of it."""

    weights: Mapping[str, Tensor]
    one: Drawn
    encoded: tuple[Tensor, Tensor]

    def to_bytes(self) -> bytes:
        """As it is sent."""
        task = self.one.task
        pairs = [[grid.tolist() for grid in (pair.input, pair.output)] for pair in task.train]  # type: ignore[union-attr]
        head = {"id": task.id, "train": pairs, "left_out": self.one.left_out, "seed": self.one.seed}
        prompts, sizes = self.encoded
        return together(head, {"weights": self.weights, "encoded": {"prompts": prompts, "sizes": sizes}})

    @classmethod
    def from_bytes(cls, content: bytes) -> Asked:
        """Inverse of `to_bytes`, but for test pairs."""
        head, parts = apart(content)
        train = tuple(Pair(*(np.array(grid, np.uint8) for grid in pair)) for pair in head["train"])
        encoded = parts["encoded"]["prompts"], parts["encoded"]["sizes"]
        return cls(parts["weights"], Drawn(Task(head["id"], train, ()), head["left_out"], head["seed"]), encoded)


def trained_bytes(found: Trained) -> bytes:
    """Where a training led, as it is sent."""
    return together({"losses": found.losses}, {"weights": found.weights, "gradients": found.gradients})


def read_trained(content: bytes) -> Trained:
    """Inverse of `trained_bytes`."""
    head, parts = apart(content)
    return Trained(parts["weights"], parts["gradients"], head["losses"])


def together(head: dict, parts: dict[str, Mapping[str, Tensor]]) -> bytes:
    # clone: what shares memory is refused
    tensors = {
        f"{part}:{name}": tensor.detach().clone() for part, named in parts.items() for name, tensor in named.items()
    }
    return json.dumps(head).encode() + b"\n" + save(tensors)


def apart(content: bytes) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    head, _, tensors = content.partition(b"\n")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(tensors).items():
        part, _, name = key.partition(":")
        parts.setdefault(part, {})[name] = tensor
    return json.loads(head), parts
