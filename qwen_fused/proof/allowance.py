"""What the caller of a proof declares to be intended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from qwen_fused.proof.cuts import Event
from qwen_fused.proof.frames import Frame, of_function


class Allowance:
    """What the caller declares to be intended, and how often each entry was needed.

    An entry is a pattern (`*` and `?`) for a parameter or module name; a function ("baseline"), a function of a file
    ("policy.py:baseline") or a line ("policy.py:41") within which an operation loses the gradient on purpose; an
    operation ("torch.no_grad", a custom Function's name) or a kind of cut ("argmax").
    """

    def __init__(self, entries: Iterable[str]):
        entries = (entries,) if isinstance(entries, str) else tuple(entries)
        for entry in entries:
            if not isinstance(entry, str):
                raise ValueError(f"allow must hold strings, got {type(entry).__name__}")
        self.matches = dict.fromkeys(entries, 0)

    def name(self, name: str) -> bool:
        """Whether a parameter or module may be left without a gradient, frozen, or in evaluation mode."""
        return self._match([name])

    def event(self, event: Event, *, count: bool = True) -> bool:
        """Whether a cut is intended; counted as a match or only asked."""
        frames_of = [frame for frame in (event.site.user, event.site.inside, event.at) if frame is not None]
        lines = [f"{frame.file.rpartition('/')[2]}:{frame.line}" for frame in frames_of]
        candidates = [event.kind, event.operation, *lines, *_functions(event.site.callers)]
        return self._match(candidates) if count else bool(self._found(candidates))

    def custom(self, name: str, callers: Iterable[str]) -> bool:
        """Whether a custom operation's own backward is to be taken at its word."""
        return self._match([name, name.rpartition("::")[2], *_functions(callers)])

    def hook(self, frames_of: Iterable[Frame | None], callers: Iterable[str]) -> bool:
        """Whether a hook on a tensor of the loss function's own may change a gradient: its name, line or caller."""
        known = [frame for frame in frames_of if frame is not None]
        files = [(frame, frame.file.rpartition("/")[2]) for frame in known]
        functions = _functions([*callers, *(f"{file}:{frame.function}" for frame, file in files)])
        return self._match([*(f"{file}:{frame.line}" for frame, file in files), *functions])

    def given(self, function: Callable[..., Any] | None) -> bool:
        """Whether what the caller gave, a backward or a step, is to be taken at its word: by its function's name."""
        frame = of_function(function)
        return frame is not None and self._match(_functions([f"{frame.file.rpartition('/')[2]}:{frame.function}"]))

    def function(self, name: str) -> bool:
        """Whether one of torch's own functions is to be taken at its word: named in full, no pattern."""
        return self._count([entry for entry in self.matches if entry in (name, f"torch.{name}", f"F.{name}")])

    def _match(self, candidates: list[str]) -> bool:
        return self._count(self._found(candidates))

    def _found(self, candidates: list[str]) -> list[str]:
        return [entry for entry in self.matches if any(fnmatchcase(c, entry) for c in candidates)]

    def _count(self, found: list[str]) -> bool:
        for entry in found:
            self.matches[entry] += 1
        return bool(found)


def _functions(callers: Iterable[str]) -> list[str]:
    """Every way to name the functions around an operation: file and function, qualified name, name."""
    names = []
    for caller in callers:
        file, _, function = caller.partition(":")
        last = function.rpartition(".")[2]
        names += [caller, function, last, f"{file}:{last}"]
    return names
