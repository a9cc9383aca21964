"""Checkpoints without pickle: one safetensors file, tensors as tensors and everything else as JSON in its header.

A file is written beside its final name, flushed to disk and renamed, so a checkpoint is either whole or not there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PATTERN = re.compile(r"step-(\d{6,})\.safetensors")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as folder/step-NNNNNN.safetensors and delete all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder; made if missing.
        step: batches done.
        state: nested dicts and lists of tensors, numbers, strings, booleans and None.
        keep: how many numbered checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    write_state(path, state)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write one state file atomically."""
    tensors: dict[str, Tensor] = {}
    structure = _flatten(state, "", tensors)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(structure)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors arrive on the CPU.

    Raises:
        ValueError: the file is not a checkpoint of this project, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restore(json.loads(metadata["state"]), tensors)
    except FileNotFoundError:
        raise ValueError(f"checkpoint must be an existing file, got {path}") from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Numbered checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.safetensors") if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run folder, its checkpoints folder, or a file stands for: the newest one there.

    Raises:
        ValueError: there is none.
    """
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := list_checkpoints(folder):
            return found[-1]
    raise ValueError(f"resume must be a run folder or a checkpoint, got {path}, which holds no step-*.safetensors")


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


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor by {"tensor": its name}, and mark dicts with non-string keys, which JSON would change."""
    if isinstance(value, Tensor):
        # clone: tied weights share memory, which safetensors refuses
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{path}: {type(value)} does not go into JSON"
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_restore(item, tensors) for item in value["list"]]
    return {key: _restore(item, tensors) for key, item in value["items"]}
