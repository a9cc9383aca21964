"""Groups of parameters, and their parts, as one list of tensors with ranges over it; what is doubtful is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

from torch import Tensor, nn

Tensors = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
TIED = ("refuse", "first")


@dataclass
class FlatGroups:
    """Every group's parameters, one after the other.

    Args:
        tied: what becomes of a parameter that comes again: "refuse", or "first": it stays in the first place alone.
        parameters: all of them.
        tensors: group, or "group/part" -> the names of its parameters.
        groups, parts: name -> its range in `parameters`.
        places: id of a parameter -> where it was first, for a sentence.
    """

    tied: str
    parameters: list[Tensor] = field(default_factory=list)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)

    def add_group(self, group: str, members: Tensors | Mapping[str, Tensors]) -> None:
        """Append a group, or a group's parts, which are measured each alone too."""
        begin = len(self.parameters)
        if not isinstance(members, Mapping):
            self._open(group)
            self._append(group, members)
        else:
            names = self._open(group)
            for part, part_members in members.items():
                column, part_begin = f"{group}/{part}", len(self.parameters)
                self._open(column)
                names += self._append(column, part_members)
                self.parts[column] = (part_begin, len(self.parameters))
        self.groups[group] = (begin, len(self.parameters))

    def _open(self, name: str) -> list[str]:
        if name in self.tensors:
            raise ValueError(f"groups and parts must differ in name, got {name} as a group and as a group's part")
        names = self.tensors[name] = []
        return names

    def _append(self, name: str, members: Tensors) -> list[str]:
        names = self.tensors[name]
        for place, member in enumerate(_unread(name, members)):
            label, parameter = member if isinstance(member, tuple) else (f"{name}[{place}]", member)
            if not isinstance(parameter, Tensor):
                raise ValueError(f"group {name} must hold parameters, got {type(parameter).__name__} at {place}")
            if not parameter.is_leaf and not parameter.retains_grad:
                raise ValueError(
                    f"group {name} must hold parameters, got {label}, which is computed from others and keeps no "
                    f"gradient: call its retain_grad() before, or name what it is computed from"
                )
            here = f"{label} of group {name}"
            first = self.places.setdefault(id(parameter), here)
            # the parameters are kept, so that no later one has the id of one that is gone
            if first is here:
                self.parameters.append(parameter)
                names.append(label)
            elif self.tied == "refuse":
                raise ValueError(
                    f"each parameter must be in one group once, got {here} again after {first}; where weights are "
                    f'tied, tied="first" counts them in the first group that has them'
                )
        return names


def flatten(groups: Mapping[str, Tensors | Mapping[str, Tensors]], tied: str) -> FlatGroups:
    """The groups as `GroupGradNorm` is given them, laid out flat.

    Raises:
        ValueError: what `GroupGradNorm` says of its arguments.
    """
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must map names to parameters, got a {type(groups).__name__}")
    if tied not in TIED:
        raise ValueError(f"tied must be one of {', '.join(TIED)}, got {tied!r}")
    flat = FlatGroups(tied)
    for group, members in groups.items():
        flat.add_group(group, members)
    return flat


def _unread(name: str, members: Tensors) -> list[Any]:
    """The members as a list; an iterator that somebody has read before would be an empty group without a word."""
    if isinstance(members, nn.Module):
        return list(members.named_parameters())
    if isinstance(members, (Tensor, str)) or not isinstance(members, Iterable):
        raise ValueError(f"group {name} must be a list of parameters, got a {type(members).__name__}")
    if isinstance(members, GeneratorType):
        # one that is fresh and gives nothing is a module without parameters
        used_up = inspect.getgeneratorstate(members) == inspect.GEN_CLOSED
    else:
        used_up = isinstance(members, Iterator)
    found: list[Any] = list(members)
    if used_up and not found:
        raise ValueError(
            f"group {name} must be a list of parameters, got a {type(members).__name__} that gives none: "
            f"it has been read before"
        )
    return found
