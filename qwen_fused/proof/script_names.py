"""Names for the parameters of somebody else's script: as its modules say, or its variables."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

from qwen_fused.proof import frames


def variables_of(frame: FrameType | None) -> dict[str, Any]:
    """Variables of the script's functions that are being called, and of its module, which win."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code is not frames.boundary.__code__:
        if frames._owner(frame.f_code.co_filename) == "user":
            found = {**found, **frame.f_locals, **frame.f_globals}
        frame = frame.f_back
    found.pop("self", None)
    return found


def name_parameters(
    wanted: Mapping[int, Tensor], variables: Mapping[str, Any], spare: Mapping[int, str]
) -> tuple[dict[int, str], dict[str, nn.Module]]:
    """Name parameters, and give the outermost modules that hold them.

    Args:
        wanted: id -> parameter.
        variables: of the script.
        spare: id -> what to call it where neither a module nor a variable is.

    Returns:
        id -> name, and prefix of names -> module; the prefix of the only module is empty.
    """
    roots = sorted(_roots(wanted), key=lambda root: -sum(id(p) in wanted for p in root.parameters()))
    names: dict[int, str] = {}
    modules: dict[str, nn.Module] = {}
    for root in roots:
        prefix = "" if len(roots) == 1 else _variable(root, variables) or type(root).__name__
        prefix = f"{prefix}_{len(modules)}" if prefix in modules else prefix
        modules[prefix] = root
        for name, parameter in root.named_parameters(prefix=prefix):
            if id(parameter) in wanted:
                names.setdefault(id(parameter), name)
    for key, tensor in wanted.items():
        if key not in names:
            names[key] = _variable(tensor, variables) or spare.get(key, f"<{'x'.join(map(str, tensor.shape))}>")
    return _told_apart(names), modules


def _roots(wanted: Mapping[int, Tensor]) -> Iterable[nn.Module]:
    """Modules that hold any of the parameters and are in no other module."""
    # some proxies claim another class than theirs
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module) and "_modules" in vars(found)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module.children():
            parents.setdefault(id(child), []).append(module)
    stack = [m for m in modules if any(id(p) in wanted for p in m.parameters(recurse=False))]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        above = parents.get(id(module), [])
        stack += above
        if not above:
            yield module


def _variable(value: Any, variables: Mapping[str, Any]) -> str | None:
    return next((name for name, held in variables.items() if held is value and not name.startswith("_")), None)


def _told_apart(names: Mapping[int, str]) -> dict[int, str]:
    taken: dict[str, int] = {}
    apart = {}
    for key, name in names.items():
        taken[name] = taken.get(name, 0) + 1
        apart[key] = name if taken[name] == 1 else f"{name} ({taken[name]})"
    return apart
