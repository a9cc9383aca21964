"""What a loop's functions keep outside modules: globals that it writes, its closure, containers, objects of the user's.

A recurrent state in a dict, a running baseline in a global, a teacher's centre: put back before each call, as modules'
attributes are, or no two evaluations would be of one function. Found from the function's own code, never from source.
"""

from __future__ import annotations

import dis
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_fused.proof.frames import is_users

GENERATORS = (torch.Generator, np.random.Generator, random.Random)
_MAPPINGS, _SEQUENCES = (dict, OrderedDict, defaultdict), (list, deque)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# objects in objects, functions that call functions: so deep
_DEEPEST = 4
# bytes of tensors that are copied: a state, no data set and no large model
_MOST = 64 << 20


@dataclass
class OuterState:
    """Where a function may keep something, found once; each place is listed once.

    Args:
        names: namespaces and the names in them that the code assigns to: globals, attributes of plain objects.
        cells: variables of the functions around it.
        containers: plain dicts, lists and deques.
        tensors: tensors and arrays that may be written to.
        generators: random generators.
    """

    names: list[tuple[MutableMapping[str, Any], tuple[str, ...] | None]] = field(default_factory=list)
    cells: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, functions: Iterable[Callable[..., Any]], known: Mapping[int, Any]) -> OuterState:
        """Look through functions of the user's, and what they reach.

        Args:
            functions: the loss function, and a backward and a step where they are given.
            known: id -> modules and tensors that are kept already.
        """
        found = cls()
        search = _Search(found, dict(known))
        for module in [kept for kept in known.values() if isinstance(kept, nn.Module)]:
            search.attributes(module)
        for function in functions:
            search.value(function, 0)
        size = 0
        for place, tensor in enumerate(found.tensors):
            size += tensor.nbytes
            if size > _MOST:
                del found.tensors[place:]
                break
        return found


class OuterMark:
    """What the places held at one moment."""

    def __init__(self, places: OuterState):
        self._names = [(space, names, _some(space, names)) for space, names in places.names]
        self._cells = [(cell, cell.cell_contents) for cell in places.cells]
        # a name may have been given another container since
        held = [value for _, _, values in self._names for value in values.values()]
        held += [value for _, value in self._cells]
        containers = {id(c): c for c in (*places.containers, *held) if type(c) in (*_MAPPINGS, *_SEQUENCES)}.values()
        self._mappings = [(mapping, dict(mapping)) for mapping in containers if isinstance(mapping, dict)]
        self._sequences = [(sequence, list(sequence)) for sequence in containers if not isinstance(sequence, dict)]
        self._contents = [(t, t.detach().clone() if isinstance(t, Tensor) else t.copy()) for t in places.tensors]

    def put_back(self) -> None:
        """Set back every number, tensor and array that is another now, and what was written to tensors and arrays."""
        for space, names, values in self._names:
            _put_back(space, values, list(space) if names is None else list(names))
        for cell, value in self._cells:
            if cell.cell_contents is not value and (_matters(value) or _matters(cell.cell_contents)):
                cell.cell_contents = value
        for mapping, values in self._mappings:
            _put_back(mapping, values, list(mapping))
        for sequence, items in self._sequences:
            same = len(sequence) == len(items) and all(a is b for a, b in zip(sequence, items, strict=True))
            # a list of counts or names is somebody's log
            if not same and any(_matters(item) and not isinstance(item, int) for item in (*sequence, *items)):
                sequence.clear()
                sequence.extend(items)
        for tensor, value in self._contents:
            if isinstance(tensor, Tensor):
                tensor.data.copy_(value)
            else:
                tensor[...] = value


def _some(space: Mapping[str, Any], names: tuple[str, ...] | None) -> dict[str, Any]:
    return dict(space) if names is None else {name: space[name] for name in names if name in space}


def _put_back(space: MutableMapping[Any, Any], values: Mapping[Any, Any], names: list[Any]) -> None:
    for name in names:
        if name not in values and name in space and _matters(space[name]):
            del space[name]
    for name, value in values.items():
        if space.get(name) is not value and (_matters(value) or _matters(space.get(name))):
            space[name] = value


def _matters(value: Any) -> bool:
    """Whether a loss may be computed with it."""
    if isinstance(value, tuple):
        return any(_matters(item) for item in value)
    if type(value) in (*_MAPPINGS, *_SEQUENCES):
        items = list(value.values() if isinstance(value, dict) else value)
        return any(_matters(item) and not isinstance(item, int) for item in items)
    return isinstance(value, (Tensor, np.ndarray, int, float))


class _Search:
    """Goes from a function to what it names and holds, and from there on."""

    def __init__(self, found: OuterState, seen: dict[int, Any]):
        self._found = found
        self._seen = seen

    def value(self, value: Any, depth: int) -> None:
        """Look at one value, once."""
        if id(value) in self._seen or depth > _DEEPEST or isinstance(value, (type, str, bytes, int, float)):
            return
        # kept alive, so that no other value gets its id
        self._seen[id(value)] = value
        if isinstance(value, GENERATORS):
            self._found.generators.append(value)
        elif isinstance(value, Tensor):
            plain = value.grad_fn is None and not value.requires_grad and not value.is_meta
            if plain and value.layout == torch.strided:
                self._found.tensors.append(value)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.dtype != object:
                self._found.tensors.append(value)
        elif isinstance(value, FunctionType):
            self._function(value, depth)
        else:
            for inner in self._inside(value):
                self.value(inner, depth + 1)

    def attributes(self, module: nn.Module) -> None:
        """Look at the numbers and containers in a module's own attributes; its tensors are kept elsewhere."""
        own = {k: v for k, v in vars(module).items() if k not in _REGISTRIES and "hooks" not in k}
        kept = (int, float, *_MAPPINGS, *_SEQUENCES)
        names = tuple(k for k, v in own.items() if type(v) in kept)
        if names:
            self._found.names.append((vars(module), names))
        for value in own.values():
            if type(value) in (*_MAPPINGS, *_SEQUENCES):
                self.value(value, 1)

    def _function(self, function: FunctionType, depth: int) -> None:
        if not is_users(function.__code__.co_filename):
            return
        codes = list(_codes(function.__code__))
        stored = {i.argval for c in codes for i in dis.get_instructions(c) if i.opname == "STORE_GLOBAL"}
        if stored:
            self._found.names.append((function.__globals__, tuple(sorted(stored))))
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen and _is_filled(cell):
                self._seen[id(cell)] = cell
                self._found.cells.append(cell)
                self.value(cell.cell_contents, depth + 1)
        for name in dict.fromkeys(name for code in codes for name in code.co_names):
            if name in function.__globals__:
                self.value(function.__globals__[name], depth + 1)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(default, depth + 1)

    def _inside(self, value: Any) -> Iterator[Any]:
        if isinstance(value, partial):
            yield from (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            yield from (value.__self__, value.__func__)
        elif type(value) in _MAPPINGS:
            self._found.containers.append(value)
            yield from list(value.values())
        elif type(value) in _SEQUENCES or type(value) is tuple:
            if type(value) is not tuple:
                self._found.containers.append(value)
            yield from list(value)[:1000]
        elif isinstance(value, nn.Module):
            # one that was not given: a teacher that the loss function itself moves
            yield from (p.detach() for p in value.parameters() if id(p) not in self._seen)
            yield from value.buffers()
        elif _is_plain(value):
            self._found.names.append((vars(value), None))
            yield from list(vars(value).values())
            yield from (method for method in vars(type(value)).values() if isinstance(method, FunctionType))


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class of the user's own, with attributes."""
    if isinstance(value, torch.optim.Optimizer) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    methods = [method for method in vars(type(value)).values() if isinstance(method, FunctionType)]
    return any(is_users(method.__code__.co_filename) for method in methods)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
