"""Builds qwen_fused._C from csrc/ for the torch that is installed, and installs without it where it can't be built.

`pip install -e .` builds in an isolated environment, for the torch of the environment that it installs into.
QWEN_FUSED_REQUIRE_EXTENSION=1 turns "installed without" into an error, for CI and packagers.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.append(sysconfig.get_path("platlib"))
os.chdir(ROOT)


def give_up(reason: str) -> None:
    """Say in one line what is missing and how to build later; an error only where the extension is required."""
    line = (
        f"qwen_fused: installed without its C++ extension: {reason}; "
        f'to build it later: {sys.executable} -m pip install --no-deps -e "{ROOT}"'
    )
    if os.environ.get("QWEN_FUSED_REQUIRE_EXTENSION") == "1":
        raise SystemExit(line)
    # a build frontend runs this file for the metadata first
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(line, file=sys.stderr)


def limit_jobs() -> None:
    """Let a compile job have 2 GiB, which torch's headers ask for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        gib = 4.0
    os.environ.setdefault("MAX_JOBS", str(max(1, min(cores, int(gib // 2), 16))))


def cuda_obstacle(torch) -> str | None:
    """What stands in the way of the CUDA half, or None; a visible GPU is not needed to build."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and os.access("/usr/local/cuda/bin/nvcc", os.X_OK):
        # torch would take the folder of the first nvcc on PATH, which may be a wrapper with no headers beside it
        home = os.environ["CUDA_HOME"] = "/usr/local/cuda"
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return f"torch {torch.__version__} wants CUDA {torch.version.cuda}, and no nvcc was found (set CUDA_HOME)"
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", answer)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "of unknown version"
        return f"{nvcc} is CUDA {version}, torch {torch.__version__} wants CUDA {torch.version.cuda}"
    return None


def pybind11_headers() -> list[str]:
    """The folder of pybind11's headers; none where it is not installed, as torch brings a copy along with its own."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def extension() -> tuple[list, type]:
    """The extension to build and the command that builds it; nothing, and a plain build_ext, where it can't be."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        give_up(f"no torch to build for ({error})")
        return [], build_ext
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        give_up(f"no C++ compiler ({compiler} is not on PATH)")
        return [], build_ext

    limit_jobs()
    obstacle = cuda_obstacle(torch)
    # *_cuda.cu has the kernels and no torch header; *_cuda_ops.cpp checks arguments and registers them
    sources = sorted(glob.glob("csrc/**/*.cpp", recursive=True))
    if obstacle is not None:
        sources = [source for source in sources if not source.endswith("_cuda_ops.cpp")]
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    if obstacle is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        # torch's own list of capabilities knows this variable only; reload the home found above
        cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME", cpp_extension.CUDA_HOME)
        kind = cpp_extension.CUDAExtension
        sources += sorted(glob.glob("csrc/**/*.cu", recursive=True))
        # with commas, as a shell would end its command at a semicolon
        architectures = ",".join(re.split(r"[;\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip("; ")))
        cxx.append(f"-DQF_CUDA_ARCHITECTURES={architectures}")
    else:
        print(f"qwen_fused: building the CPU half only: {obstacle}", file=sys.stderr)
        kind = cpp_extension.CppExtension
    arguments = {"cxx": cxx, "nvcc": ["-O3", "-lineinfo"]}
    module = kind(
        "qwen_fused._C",
        sources,
        include_dirs=pybind11_headers(),
        extra_compile_args=arguments,
        extra_link_args=["-fopenmp"],
    )

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                give_up(f"the build failed ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
                # nothing was produced: leave nothing for setuptools to copy
                self.extensions = []

    return [module], Build


modules, command = extension()
setup(
    # kernels is a link to a folder without an __init__.py: see docs/architecture.md
    packages=[*find_packages(include=["qwen_fused", "qwen_fused.*"]), "qwen_fused.kernels"],
    ext_modules=modules,
    cmdclass={"build_ext": command},
)
