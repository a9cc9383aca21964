"""Everything that a proof may disturb, taken down before it and put back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_fused.common.random_state import GlobalRandomState, generator_state, set_generator_state
from qwen_fused.proof.held_state import AttributeMark, HeldBuffer, HeldOptimizer, is_same
from qwen_fused.proof.optimizers import groups_of, innermost
from qwen_fused.proof.outer_state import GENERATORS, OuterMark, OuterState

Mark = AttributeMark | OuterMark
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """State of modules, parameters, optimizers and random generators.

    Args:
        parameters: tensors whose values, gradients and requires_grad come back.
        modules: whose buffers, submodules, modes and other attributes come back too.
        optimizers: whose state and options come back.
        functions: the loss function and others, searched for what they keep elsewhere, and for generators.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        modules: Iterable[nn.Module],
        optimizers: Sequence[Any],
        functions: Sequence[Callable[..., Any]],
    ):
        self.modules = {id(m): m for module in modules for m in module.modules()}
        everything = [*parameters, *(p for m in self.modules.values() for p in m.parameters(recurse=False))]
        everything += [p for group in groups_of(optimizers) for p in group["params"]]
        self.parameters = list({id(p): p for p in everything}.values())
        self._flags = [(p, p.requires_grad, p.grad) for p in self.parameters]
        buffers = [b for m in self.modules.values() for b in m.buffers(recurse=False)]
        copy_of = _copier([*self.parameters, *buffers])
        # detached aliases keep the storage even if somebody gives the parameter another
        self._values = [(p.data, copy_of(p.data)) for p in self.parameters]
        buffers = list({id(b): b for b in buffers}.values())
        self._buffers = [HeldBuffer(b, b.data, copy_of(b), b.requires_grad) for b in buffers]
        self._marks: Sequence[Mark] = ()
        self._frozen = [(p, *v) for p, v in zip(self.parameters, self._values, strict=True) if not p.requires_grad]
        # scripted modules keep theirs where python can't replace them
        plain = [m for m in self.modules.values() if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = [(m, _attributes(m)) for m in plain]
        everyone = {id(o): o for given in optimizers for o in (given, innermost(given))}
        self._optimizers = [HeldOptimizer.of(o, copy_of) for o in everyone.values()]
        known = {id(kept): kept for kept in (*self.modules.values(), *self.parameters, *buffers)}
        self._outer = OuterState.of(functions, known)
        self._generators = [(g, generator_state(g)) for g in self._all_generators()]
        self._random = GlobalRandomState.now()
        self._start = self.attributes_now()

    def reset(self) -> None:
        """Put random generators and buffers back, so that the loss function does once more what it did."""
        for module, (_, registries, _) in self._attributes:
            _refill(module._buffers, registries["_buffers"])
        for buffer in self._buffers:
            buffer.put_back()
        for mark in self._marks:
            mark.put_back()
        for parameter, alias, value in self._frozen:
            # a momentum encoder that the loss function itself moves
            alias.copy_(value)
            if not is_same(parameter.data, alias):
                parameter.data = alias
        for generator, state in self._generators:
            set_generator_state(generator, state)
        self._random.put_back()

    def _all_generators(self) -> list[Any]:
        """Generators in modules' attributes and wherever the loss function gets at them."""
        held = [value for module in self.modules.values() for value in module.__dict__.values()]
        return list({id(g): g for g in (*held, *self._outer.generators) if isinstance(g, GENERATORS)}.values())

    def mark_attributes(self, marks: Sequence[Mark] | None = None) -> None:
        """From now on `reset` brings back the tensors in modules' plain attributes, a recurrent state say.

        As they were at the start, or when other marks were taken.
        """
        self._marks = self._start if marks is None else marks

    def attributes_now(self) -> list[Mark]:
        """Marks of what modules keep in plain attributes, and the loss function elsewhere, at this moment."""
        return [*(AttributeMark(module) for module, _ in self._attributes), OuterMark(self._outer)]

    def reset_values(self) -> None:
        """Put the parameters' values back."""
        for (alias, value), parameter in zip(self._values, self.parameters, strict=True):
            alias.copy_(value)
            if not is_same(parameter.data, alias):
                parameter.data = alias

    def seed_generators(self, seed: int) -> None:
        """Set the generators that modules and the loss function hold to a seed; `reset` puts them back."""
        for generator, _ in self._generators:
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            else:
                generator.seed(seed)

    def values_of(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of named parameters at the start, not to be written to."""
        values = {id(p): value for p, (_, value) in zip(self.parameters, self._values, strict=True)}
        return {name: values[id(p)].to(p.device) for name, p in named.items()}

    def clear_gradients(self) -> None:
        """Set every gradient to None; those there were are kept for `restore`."""
        for parameter in self.parameters:
            parameter.grad = None

    def reset_optimizers(self) -> None:
        """Put the optimizers' state and options back."""
        with torch.no_grad():
            for held in self._optimizers:
                held.put_back()

    def restore(self) -> None:
        """Put everything back."""
        self._marks = ()
        for module, (own, registries, containers) in self._attributes:
            for name in [name for name in module.__dict__ if name not in own]:
                del module.__dict__[name]
            module.__dict__.update(own)
            for name, entries in (registries | containers).items():
                _refill(module.__dict__[name], entries)
        for mark in self._start:
            mark.put_back()
        self.reset_values()
        for parameter, requires_grad, grad in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        self.reset_optimizers()
        self.reset()


def _copier(tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that copies tensors: on their own device where there is ample room, else to the host."""
    needed = sum(t.numel() * t.element_size() for t in tensors if t.is_cuda)
    # optimizer state is about twice as much again
    if needed and 3 * needed > torch.cuda.mem_get_info()[0] // 2:
        return lambda t: t.detach().to("cpu", copy=True)
    return lambda t: t.detach().clone()


def _attributes(module: nn.Module) -> tuple[dict, dict, dict]:
    """A module's attributes, what its registries hold, and what its plain containers hold."""
    own = dict(module.__dict__)
    registries = {name: dict(own[name]) for name in _REGISTRIES if name in own}
    containers = {
        name: value.copy()
        for name, value in own.items()
        if type(value) in (dict, list, set) and name not in registries and "hooks" not in name
    }
    return own, registries, containers


def _refill(container: Any, entries: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(entries)
    else:
        container.update(entries)
