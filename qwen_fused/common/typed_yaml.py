"""A configuration dataclass from YAML and back: every key known, every value of its field's type, or one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
WORDS = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", Path: "a path"}


class Loader(yaml.SafeLoader):
    """Plain values only; `5e-5` is a number, as in YAML 1.2, and a key given twice is an error."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty file has none.

    Raises:
        ValueError: the file cannot be read, is not YAML, or holds something else than keys and values.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where} is not YAML: {problem or str(error).splitlines()[0]}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(content).__name__}")
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "; did you mean X?", or nothing when no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def to_plain(value: Any) -> Any:
    """A dataclass as what YAML can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def from_plain(cls: type[T], plain: Mapping[str, Any], base: T | None = None, prefix: str = "") -> T:
    """Inverse of `to_plain`; keys that are left out keep the value of `base`, or the default.

    Raises:
        ValueError: a key is unknown or a value has another type than its field; the message names the key.
    """
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    values = {name: getattr(base, name) for name in hints} if base is not None else {}
    for name, value in plain.items():
        if name not in hints:
            known = [prefix + other for other in hints]
            shown = f"{prefix}{name}" if str(name).isprintable() else repr(name)
            raise ValueError(f"{shown} is not a key of the configuration{nearest(f'{prefix}{name}', known)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name} must be keys and values, got {value!r}")
            values[name] = from_plain(hint, value, values.get(name), f"{prefix}{name}.")
        else:
            values[name] = _converted(value, hint)
            check_type(prefix + name, values[name], hint)
    return cls(**values)


def check_types(config: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ValueError: a value has another type than its field; the message names the field.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        check_type(name, getattr(config, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError that names what was expected of `name` and what came, where `value` is no `hint`."""
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _converted(value: Any, hint: Any) -> Any:
    """YAML knows no paths, and writes 1 for 1.0."""
    options = get_args(hint) if _is_union(hint) else (hint,)
    if Path in options and isinstance(value, str):
        return Path(value)
    if float in options and isinstance(value, int) and _fits(value, float):
        return float(value)
    return value


def _described(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_described(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if hint is type(None):
        return "null"
    return WORDS.get(hint, f"of type {getattr(hint, '__name__', hint)}")
