"""States of torch's random generators: for a call that is repeated, and for a run that goes on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class RandomState:
    """Generators as they were before a call: the CPU's and, where CUDA is in use, every device's."""

    cpu: Tensor  # uint8
    cuda: list[Tensor]  # uint8

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        same = len(self.cuda) == len(other.cuda) and torch.equal(self.cpu, other.cpu)
        return same and all(torch.equal(one, two) for one, two in zip(self.cuda, other.cuda, strict=True))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run with these states; the present ones come back afterwards."""
        with torch.random.fork_rng(devices=range(len(self.cuda))):
            self.put_back()
            yield

    def put_back(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators that a step may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass
class GlobalRandomState:
    """Every generator that code draws from without naming one: Python's, numpy's, torch's on each device."""

    python: Any
    numpy: Any
    torch: RandomState

    @classmethod
    def now(cls) -> GlobalRandomState:
        return cls(random.getstate(), np.random.get_state(), RandomState.now())

    def put_back(self) -> None:
        """Set all of them to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        self.torch.put_back()


def generator_state(generator: torch.Generator | np.random.Generator | random.Random) -> Any:
    """State of one generator, of any of the three libraries."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def set_generator_state(generator: torch.Generator | np.random.Generator | random.Random, state: Any) -> None:
    """Inverse of `generator_state`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)
