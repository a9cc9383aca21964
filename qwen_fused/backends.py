"""What of the compiled code is there on this machine, and why not the rest."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

HAS_EXTENSION = False
EXTENSION_ERROR: str | None = None
EXTENSION_HAS_CUDA = False
HAS_TRITON = False
TRITON_ERROR: str | None = None


def has_op(name: str) -> bool:
    """Whether torch.ops.qwen_fused.<name> exists, compiled or registered from Python."""
    return hasattr(torch.ops.qwen_fused, name)


def built_with() -> dict[str, str]:
    """Compiler, instruction sets, torch and CUDA architectures that the extension was built with and for."""
    if not HAS_EXTENSION:
        return {}
    return importlib.import_module("qwen_fused._C").built_with()


@functools.cache
def has_kernel(name: str, device: str) -> bool:
    """Whether torch.ops.qwen_fused.<name> has a kernel for tensors of that device type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return (
        key is not None and has_op(name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"qwen_fused::{name}", key)
    )


def build_command() -> str:
    """The exact command that builds the extension for this interpreter and its torch."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").exists():
        return f'{sys.executable} -m pip install --no-deps -e "{checkout}"'
    options = "--no-deps --force-reinstall --no-cache-dir --no-binary qwen-fused"
    return f"{sys.executable} -m pip install {options} qwen-fused"


def _load_extension() -> str | None:
    if importlib.util.find_spec("qwen_fused._C") is None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            return f"not built: no C++ compiler ({compiler}) on PATH (on Debian and Ubuntu: apt-get install g++)"
        return "not built: at installation torch or the compiler was missing, or the build failed"
    try:
        import qwen_fused._C  # noqa: F401
    except ImportError as error:
        return f"built for another torch than {torch.__version__}: {error}"
    return None


def _why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


EXTENSION_ERROR = _load_extension()
HAS_EXTENSION = EXTENSION_ERROR is None
EXTENSION_HAS_CUDA = has_kernel("group_grad_norm", "cuda")
TRITON_ERROR = _why_no_triton()
HAS_TRITON = TRITON_ERROR is None


def _launches() -> str:
    from qwen_fused.kernels.launcher import NOT_DIRECT

    return f"by its own launcher: {NOT_DIRECT}" if NOT_DIRECT else "past its own launcher"


def describe() -> dict[str, str]:
    """What was built, what is used here and why not the rest, for `qwen-fused info`; every value is one line."""
    cuda = torch.cuda.is_available()
    capability = torch.backends.cpu.get_cpu_capability()
    report = {
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "cpu": f"{torch.get_num_threads()} threads, {capability}",
        "gpu": torch.cuda.get_device_name() if cuda else "none visible",
        "extension": "built" if HAS_EXTENSION else EXTENSION_ERROR or "",
    }
    report |= {f"extension: {name}": value for name, value in built_with().items()}
    if not HAS_EXTENSION:
        report["build the extension"] = build_command()
    elif EXTENSION_HAS_CUDA:
        report["extension for CUDA"] = "built"
    elif torch.version.cuda is None:
        report["extension for CUDA"] = f"not built: torch {torch.__version__} is a CPU build"
    else:
        report["extension for CUDA"] = (
            f"not built: set CUDA_HOME to a CUDA {torch.version.cuda} toolkit, then {build_command()}"
        )
    report["triton"] = f"there, launches {_launches()}" if HAS_TRITON else f"missing: {TRITON_ERROR}"
    fallback = "plain torch"
    report["gradient norms on the CPU"] = "C++ extension" if has_kernel("group_grad_norm", "cpu") else fallback
    report["loss on the CPU"] = "C++ extension" if has_kernel("efe_loss", "cpu") else "reference"
    if cuda:
        report["gradient norms on CUDA"] = "CUDA extension" if EXTENSION_HAS_CUDA else fallback
        report["loss on CUDA"] = "Triton" if HAS_TRITON else "reference"
    return report
