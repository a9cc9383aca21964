"""Files that are whole or not there, whatever ends the process, and run folders that one process writes at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Give a path to write to; when all went well what is there takes the place of `path`, else it is removed.

    A kill leaves the old file or the new one, and perhaps a folder .partial-*, which `remove_partial` clears.
    """
    # a folder, since safetensors has temporary files of its own beside the one it writes
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield folder / path.name
        fsync(folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # the new name itself is on disk only when its folder is
    fsync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file as a whole, in place of what was there."""
    with atomic_replace(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def safe_name(name: str) -> str:
    """The name itself where it is a plain file name, else the plain part of it and a hash: never a way out of a folder.

    Args:
        name: anything, as the ids of tasks are.
    """
    if re.fullmatch(r"\w[\w.-]{0,59}", name):
        return name
    plain = re.sub(r"[^\w-]+", "_", name).strip("_-")[:40]
    return f"{plain or 'task'}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def remove_partial(folder: Path) -> None:
    """Remove what a killed process had half written in this folder."""
    for stray in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(stray)


def fsync(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: another process has it, or nothing can be written there.
    """
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"the run folder must be one that can be written to, got {folder}")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"the run folder must not be in use, got {folder}, which another process writes to") from None
    except OSError:
        # some network file systems lock no folders: go without
        pass
    try:
        yield
    finally:
        os.close(handle)
