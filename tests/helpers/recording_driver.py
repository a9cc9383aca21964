"""Triton's own driver and C launchers over a libcuda that keeps what it is asked to launch (recording_cuda.c)."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

BYTES_OF = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
HEAD = 12


class Launched(NamedTuple):
    """A launch as libcuda was asked for it."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    options: tuple[int, ...]  # bytes of shared memory, attributes, parameters, whether there is an `extra`
    stream: int
    parameters: bytes


class Recording:
    """A libcuda for whatever is loaded after it."""

    def __init__(self, folder: str) -> None:
        library = Path(folder) / "libcuda.so.1"
        source = Path(__file__).with_name("recording_cuda.c")
        headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        line = ["cc", "-O1", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o", library, source]
        subprocess.run(line, check=True)
        # Triton's launchers are linked against what lies there, and find the one of this name when they are loaded
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.recording_take.restype = ctypes.c_size_t
        self.buffer = ctypes.create_string_buffer(1 << 16)

    def take(self) -> Launched | None:
        """The launch since the last time, of which there must not be two; None where there was none."""
        count = self.library.recording_take(self.buffer, len(self.buffer))
        kept = self.buffer.raw[:count]
        if not kept:
            return None
        head = [int.from_bytes(kept[8 * i : 8 * i + 8], "little") for i in range(HEAD)]
        return Launched(head[0], (*head[1:4],), (*head[4:7],), (*head[7:11],), head[11], kept[8 * HEAD :])


class Driver(CudaDriver):
    """Triton's driver for devices that are not there; each has a stream of its own number."""

    def __init__(self) -> None:
        self.device = 0
        super().__init__()
        self.get_current_device = lambda: self.device
        self.get_current_stream = self.stream_of

    def stream_of(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def flat(signature: Any) -> list[str]:
    """Types of a signature without tuples and constants."""
    if isinstance(signature, tuple):
        return [x for part in signature for x in flat(part)]
    return [] if signature == "constexpr" else [signature]


def sizes_of(source: Any) -> list[int]:
    """Bytes of each parameter by a kernel's signature; behind the arguments come two pointers to scratch memory."""
    return [8 if x[0] == "*" else BYTES_OF[x] for x in flat((*source.signature.values(),))] + [8, 8]


def pretend(source: Any, target: GPUTarget, options: dict) -> Any:
    """In the place of Triton's compiler: a kernel that was not compiled, with all that a launch of it needs."""
    made = triton.compiler.CompiledKernel.__new__(triton.compiler.CompiledKernel)
    made.module = made.function = made._run = made._module_pid = None
    made.src, made.hash, made.name, made.metadata_group = source, "", source.name, {}
    known = {"shared": 0, "name": source.name, "target": target, "warp_size": 32, "tmem_size": None}
    scratch = {f"{whose}_scratch_{what}": 0 for whose in ("global", "profile") for what in ("size", "align")}
    both = options | known | scratch
    made.metadata = NamedTuple("Metadata", [(name, Any) for name in both])(**both)
    made.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
    sizes = sizes_of(source)
    made.kernel = bytes([len(sizes), *sizes])
    return made


def compiled_by(compiler: Callable) -> Callable:
    """Triton's compiler, whose kernels say of their parameters what their PTX says."""

    def compile_source(source: Any, target: GPUTarget, options: dict) -> Any:
        made = compiler(source, target=target, options=options)
        entry = made.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]
        assert sizes == sizes_of(source), (sizes, sizes_of(source))
        made.kernel = bytes([len(sizes), *sizes])
        return made

    return compile_source
