"""Where in the user's source an operation was called, told apart from torch's and other libraries' own frames."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

import torch

_PROOF = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_PROOF)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_STDLIB = os.path.abspath(sysconfig.get_paths()["stdlib"])
# installed libraries that people also run from a checkout
_LIBRARIES = ("transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True)
class Frame:
    """One line of source.

    Args:
        file: path, as Python knows it.
        line: number, from 1.
        function: qualified name of the function that it is in.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line} in {self.function}"

    @property
    def source(self) -> str:
        """The line itself, or an empty string where the source isn't at hand."""
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True)
class Site:
    """The place of an operation.

    Args:
        user: innermost frame of the user's own code (the innermost library frame when there is none).
        inside: innermost library frame when the operation is in a library that the user called, else None.
        callers: functions on the way from the loss function to the operation, as "file.py:function", innermost first.
    """

    user: Frame
    inside: Frame | None = None
    callers: tuple[str, ...] = ()


NOWHERE = Site(Frame("<unknown>", 0, "<unknown>"))


def boundary(function: Any, *args: Any) -> Any:
    """Call the user's function; frames outside this one are not part of it."""
    return function(*args)


def locate(start: FrameType | None = None) -> Site:
    """The site of the operation that is being called now, seen from inside torch's modes."""
    return _site(_stack(start or sys._getframe(1)))


def line_of_call() -> tuple[str, int]:
    """File and line that the present call comes from, the innermost outside torch: cheap, made for every call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _owner(frame.f_code.co_filename) == "torch":
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def context_manager(start: FrameType | None) -> tuple[str, int]:
    """The method, and the identity, of torch's context manager that is being entered or left at this frame."""
    while start is not None and _owner(start.f_code.co_filename) == "torch":
        if start.f_code.co_name in ("__enter__", "__exit__", "__init__"):
            return start.f_code.co_name, id(start.f_locals.get("self"))
        start = start.f_back
    return "", 0


def decorated(start: FrameType | None) -> Site | None:
    """The function whose decorator made a context manager be entered at this frame; None when it was a with block."""
    # torch's own frames lead out to the wrapper, or to the user's with statement
    while start is not None and _owner(start.f_code.co_filename) == "torch":
        if start.f_code.co_name in ("decorate_context", "generator_context"):
            here = of_function(start.f_locals.get("func"))
            around = locate(start.f_back)
            if here is None:
                return None
            return _site([here]) if _owner(here.file) == "user" else Site(around.user, here, around.callers)
        start = start.f_back
    return None


def of_function(function: Any) -> Frame | None:
    """Where a Python function was defined (its first decorator's line when it has one)."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return None if code is None else Frame(code.co_filename, code.co_firstlineno, _name(code))


def of_traceback(lines: Iterable[str]) -> Site:
    """The site in a formatted traceback, as anomaly mode keeps it on an autograd node (outermost line first)."""
    found: list[Frame] = []
    for entry in lines:
        head = entry.strip().partition("\n")[0]
        file, _, rest = head.removeprefix('File "').partition('", line ')
        number, _, name = rest.partition(", in ")
        if number.isdigit():
            found.append(Frame(file, int(number), name))
            if name == "boundary" and os.path.abspath(file) == os.path.abspath(__file__):
                found.clear()
    return _site(reversed(found))


def _stack(frame: FrameType | None) -> Iterator[Frame]:
    while frame is not None and frame.f_code is not boundary.__code__:
        yield Frame(frame.f_code.co_filename, frame.f_lineno, _name(frame.f_code))
        frame = frame.f_back


def _name(code: Any) -> str:
    # qualified names came with python 3.11
    return getattr(code, "co_qualname", code.co_name)


def _site(innermost_first: Iterable[Frame]) -> Site:
    user = inside = None
    callers: list[str] = []
    for frame in innermost_first:
        owner = _owner(frame.file)
        if owner == "torch":
            continue
        callers.append(f"{os.path.basename(frame.file)}:{frame.function}")
        if owner == "user":
            user = user or frame
        elif user is None:
            inside = inside or frame
    if user is None:
        return NOWHERE if inside is None else Site(inside, None, tuple(callers))
    return Site(user, inside, tuple(callers))


def is_users(file: str) -> bool:
    """Whether a file is neither torch's nor a library's."""
    return _owner(file) == "user"


@lru_cache(maxsize=4096)
def _owner(file: str) -> str:
    """Whose file it is: "torch" (never shown), "library" or "user"."""
    path = os.path.abspath(file)
    if path.startswith(_TORCH + os.sep) or file.startswith("<frozen"):
        return "torch"
    if path.startswith(_PACKAGE + os.sep):
        # the proof's own frames are no part of anybody's model; the rest of the package is one
        return "torch" if path.startswith(_PROOF + os.sep) else "user"
    roots = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    folders = [os.path.dirname(os.path.abspath(root)) for root in roots if root] + [_STDLIB]
    if any(path.startswith(folder + os.sep) for folder in folders):
        return "library"
    installed = f"{os.sep}site-packages{os.sep}" in path or f"{os.sep}dist-packages{os.sep}" in path
    # an fx graph has no source of its own
    return "library" if installed or file.startswith("<eval_with_key>") else "user"


def _short(file: str) -> str:
    """The path as a person would write it here."""
    base = os.getcwd() + os.sep
    if os.path.abspath(file).startswith(base):
        return os.path.abspath(file).removeprefix(base)
    return file.rpartition(f"site-packages{os.sep}")[2]
