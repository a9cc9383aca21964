"""Checkpoints without pickle: one safetensors file, tensors as tensors and everything else as JSON in its header.

A file is written beside its final name, flushed to disk and renamed, so a checkpoint is either whole or not there. Its
header holds a SHA-256 over everything else, so one that a disk has changed since is not mistaken for good.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_fused.common.files import atomic_replace

FORMAT = "1"
PATTERN = re.compile(r"step-(\d{6,})\.safetensors")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as folder/step-NNNNNN.safetensors and delete all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder; made if missing.
        step: batches done.
        state: nested dicts and lists of tensors, numbers, strings, booleans and None.
        keep: how many numbered checkpoints stay.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    write_state(path, state)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write one state file atomically; OSError where that cannot be done, with the old file left."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(state, "", tensors))
    metadata = {"format": FORMAT, "state": structure, "sha256": _digest(structure, tensors)}
    with atomic_replace(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            # the library tells what the system said as text
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), str(path)) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors arrive on the CPU.

    Raises:
        ValueError: the file is not a checkpoint of this project, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"checkpoint must be an existing file, got {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT or not {"state", "sha256"} <= set(metadata):
        raise ValueError(f"checkpoint {path} must be of format {FORMAT}, got {metadata.get('format', 'none')}")
    if _digest(metadata["state"], tensors) != metadata["sha256"]:
        raise ValueError(f"checkpoint {path} is damaged: its contents do not have the checksum they were written with")
    try:
        return _restore(json.loads(metadata["state"]), tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} has a header that makes no sense: {error!r}") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Numbered checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.safetensors") if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def _digest(structure: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the structure and each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
