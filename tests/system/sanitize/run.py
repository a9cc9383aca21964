"""The CPU extension under ASan with UBSan, and under TSan, driven by its own tests; then faults that they must catch.

The whole CPU half of csrc/ is compiled anew and imported by a Python that the sanitizer's runtime is preloaded into.
torch itself is not instrumented: what is seen is our own reads, writes and arithmetic. Under TSan the loops run over
std::thread (threads/ATen/Parallel.h). That nothing is found says something only because the same tests, with a fault
planted in a copy of one file, do find it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
THREADS = Path(__file__).resolve().parent / "threads"
TILES = "loss/efe_tiles.cpp"
SOURCES = (
    "ops.cpp",
    "loss/cross_entropy.cpp",
    "loss/efe_autograd.cpp",
    "loss/efe_loss_cpu.cpp",
    "norms/grad_norm_cpu.cpp",
    "norms/grad_clip_cpu.cpp",
    "norms/measured.cpp",
    "plan/plan_core_cpu.cpp",
    TILES,
)
FLAGS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fopenmp"],
    "thread": ["-fsanitize=thread", "-pthread", f"-I{THREADS}"],
}
# libstdc++ too, which Python itself does not load: the runtime looks for its functions at the start
RUNTIMES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}
COMPLAINT = re.compile(
    r"(ERROR: AddressSanitizer: [\w-]+|runtime error: .*|WARNING: ThreadSanitizer: [^(]+|CHECK failed.*)"
)

GRADIENTS = (
    "system/test_raw_gradients.py",
    "norms/test_group_grad_norm.py",
    "norms/test_clip.py",
    "norms/test_measured.py",
    "norms/test_direct.py",
)
# a thread a process: nothing there for the thread sanitizer
PLAN = ("planner/test_plan_core.py",)
LOSS = (
    "system/test_raw_ops.py",
    "loss/test_efe_ops.py",
    "loss/test_efe_loss.py",
    "loss/test_efe_layouts.py",
    "loss/test_cross_entropy.py",
    "loss/test_cross_entropy_direct.py",
)
# not ours: the Triton kernels, what torch compiles; gigabytes of gradient; a child that has to die of its own signal
LEFT_OUT = "not triton and not inductor and not two_to_the_31 and not factor_is_one"


@dataclass(frozen=True)
class Run:
    """Tests through one build, whose loss may use the instruction sets up to `level` (QF_BEST_LEVEL)."""

    sanitizer: str
    level: int
    tests: tuple[str, ...]
    only: str = LEFT_OUT


@dataclass(frozen=True)
class Fault:
    """A change to one file, by which `source` is compiled again, and what must then be said in the run."""

    name: str
    run: Run
    source: str
    file: str
    before: str
    after: str
    complaint: str


RUNS = (
    Run("address", 4, (*LOSS, "loss/test_efe_torch.py", *GRADIENTS, *PLAN)),
    Run("address", 3, LOSS),
    Run("address", 1, LOSS),
    Run("thread", 4, (*LOSS, *GRADIENTS)),
)
FAULTS = (
    Fault(
        "a vector read past the last cell",
        Run("address", 1, ("loss/test_efe_layouts.py",), "test_canvas and cpp"),
        "loss/efe_tiles.cpp",
        "loss/levels/cells.inc.h",
        "i + std::min(l, count - 1)",
        "i + l",
        "heap-buffer-overflow",
    ),
    Fault(
        "a block written past the last element",
        Run("address", 4, ("norms/test_clip.py",)),
        "norms/grad_clip_cpu.cpp",
        "norms/grad_clip_cpu.cpp",
        "(x + i), tail, (n - i) * sizeof(BFloat16));",
        "(x + n), tail, sizeof(tail));",
        "heap-buffer-overflow",
    ),
    Fault(
        "exponents that leave their integers",
        Run("address", 1, ("loss/test_efe_loss.py",)),
        "loss/efe_tiles.cpp",
        "loss/levels/math.inc.h",
        "const U power = (bit_cast_to<U>(shifted) << 23) + (127u << 23);",
        "const I power = (bit_cast_to<I>(shifted) << 23) + (127 << 23);",
        "signed integer overflow",
    ),
    Fault(
        "vectors read through a cast pointer",
        Run("address", 4, ("norms/test_group_grad_norm.py",)),
        "norms/grad_norm_cpu.cpp",
        "common/vectorize.h",
        "  Vector to;\n  std::memcpy(&to, from, sizeof(Vector));\n  return to;",
        "  return *reinterpret_cast<const Vector*>(from);",
        "misaligned address",
    ),
    Fault(
        "room for one row of the planner's sums too few",
        Run("address", 4, PLAN),
        "plan/plan_core_cpu.cpp",
        "plan/plan_core_cpu.cpp",
        "at::empty({3 * (p.H + p.W + 2) * p.c}, options)",
        "at::empty({(p.H + p.W) * p.c}, options)",
        "heap-buffer-overflow",
    ),
    Fault(
        "one slot for every tile of the loss",
        Run("thread", 4, ("loss/test_efe_loss.py",), "test_threads"),
        "loss/efe_loss_cpu.cpp",
        "loss/efe_loss_cpu.cpp",
        "slots.data() + unit * size)",
        "slots.data())",
        "data race",
    ),
    Fault(
        "tiles handed out without an atomic counter",
        Run("thread", 4, ("loss/test_efe_loss.py",), "test_threads"),
        "loss/efe_loss_cpu.cpp",
        "common/turns.h",
        "std::atomic<int64_t> next{0};",
        "using Order = std::memory_order; struct { int64_t n; int64_t load(Order) { return n; } bool "
        "compare_exchange_weak(int64_t& a, int64_t b, Order) { return n == a ? (n = b, true) : (a = n, false); } } "
        "next{0};",
        "data race",
    ),
)


def compiled(folder: Path, sanitizer: str, level: int, source: Path) -> Path:
    """The object of one source file."""
    target = folder / f"{source.stem}-{sanitizer}{level}.o"
    command = ["g++", "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]
    command += [*FLAGS[sanitizer], f"-DQF_BEST_LEVEL={level}"]
    command += [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    done = subprocess.run([*command, "-c", source, "-o", target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: {source.name} does not compile:\n{done.stderr[-3000:]}")
    return target


def package(home: Path, sanitizer: str, objects: list[Path]) -> Path:
    """A folder to import qwen_fused from: this tree's Python, and those objects linked as its extension."""
    inside = home / "qwen_fused"
    inside.mkdir(parents=True)
    for path in (ROOT / "qwen_fused").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (inside / path.name).symlink_to(path)
    extension = inside / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", "-shared", *FLAGS[sanitizer], *objects, *libraries, "-lc10", "-ltorch_cpu"]
    command += ["-ltorch_python", "-o", extension]
    subprocess.run(command, check=True)
    return home


def with_fault(folder: Path, fault: Fault) -> Path:
    """The object of the fault's source, made in a copy of csrc/ in which that one file is changed."""
    text = (CSRC / fault.file).read_text()
    if fault.before not in text:
        raise SystemExit(f"sanitize: {fault.file} has no place to plant {fault.name!r}")
    shutil.copytree(CSRC, folder)
    (folder / fault.file).write_text(text.replace(fault.before, fault.after))
    return compiled(folder, fault.run.sanitizer, fault.run.level, folder / fault.source)


def tested(home: Path, run: Run) -> subprocess.CompletedProcess:
    """The run's tests, in a Python that the sanitizer's runtime is loaded into first."""
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[run.sanitizer]
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(paths),
        # Python itself leaves much behind at its end; a tensor too large is torch's to refuse
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(home),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # ThreadSanitizer's memory map wants addresses that are not randomised
    command = ["setarch", "-R"] if run.sanitizer == "thread" and shutil.which("setarch") else []
    # without it every test would be skipped, or run with the one that is installed, and nothing found
    own = "import os, torch, qwen_fused._C as C; assert os.path.samefile(os.path.dirname(C.__file__), 'qwen_fused'), C"
    loaded = [*command, sys.executable, "-c", own]
    done = subprocess.run(loaded, cwd=home, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return done
    # what a sanitizer says must not be caught, nor its signals
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-k", run.only]
    command += [str(ROOT / "tests" / name) for name in run.tests]
    # from there, as Python looks in its working folder before anywhere else
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def verdict(done: subprocess.CompletedProcess) -> str:
    """The sanitizer's complaint, or what pytest says at its end."""
    said = done.stdout + done.stderr
    found = COMPLAINT.search(said) or re.search(r"\d+ (?:passed|failed|error|deselected)[^\n]*", said)
    return found[0].strip() if found else f"exit code {done.returncode}"


def main() -> int:
    if shutil.which("g++") is None:
        print("sanitize: needs g++, found none on PATH", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wrong = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(min(cores, 4)) as pool:
        folder = Path(name)
        # only the tiles know of levels
        keys = sorted(
            {(run.sanitizer, run.level if source == TILES else 4, source) for run in RUNS for source in SOURCES}
        )
        made = pool.map(lambda key: compiled(folder, key[0], key[1], CSRC / key[2]), keys)
        objects = dict(zip(keys, made, strict=True))

        def done(job: Run | Fault, number: int) -> subprocess.CompletedProcess:
            run = job.run if isinstance(job, Fault) else job
            parts = {source: objects[run.sanitizer, run.level if source == TILES else 4, source] for source in SOURCES}
            if isinstance(job, Fault):
                parts[job.source] = with_fault(folder / f"fault{number}", job)
            return tested(package(folder / f"home{number}", run.sanitizer, [*parts.values()]), run)

        jobs: list[Run | Fault] = [*RUNS, *FAULTS]
        for job, result in zip(jobs, pool.map(done, jobs, range(len(jobs))), strict=True):
            found = verdict(result)
            if isinstance(job, Fault):
                run, label = job.run, f"planted: {job.name}"
                right = result.returncode != 0 and job.complaint in found
            else:
                run, label = job, "the tests of the extension" if job.tests != LOSS else "the tests of the loss"
                right = result.returncode == 0
            wrong += not right
            print(f"{'ok' if right else 'WRONG':6}{run.sanitizer:9}v{run.level:<3}{label:54}{found}", flush=True)
            if not right:
                print((result.stdout + result.stderr)[-6000:], file=sys.stderr)
    print("the sanitizers found nothing but what was planted" if not wrong else f"{wrong} not as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
