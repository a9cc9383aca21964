"""The CUDA kernels, unmodified, compiled for the host: right against 80-bit arithmetic, clean under the sanitizers.

A shim in tests/norms/cuda_shim/ makes a block of real threads, with its barriers and shuffles. The last tests plant
faults and see the sanitizers find them: without that, a clean run would say nothing.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "norms"
SHIM = ROOT / "tests" / "norms" / "cuda_shim"
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
KINDS = {"f32": (0, 4), "f64": (1, 8), "f16": (2, 2), "bf16": (3, 2)}
CHUNK_BYTES = 1 << 17


@dataclass(frozen=True)
class Fault:
    """A change to one file that the sanitizer must complain of."""

    name: str
    sanitizer: str
    complaint: str
    file: str
    before: str
    after: str
    kernel: str = "grad_norm_cuda.cu"


BARRIER, ONE_WRITES = "  __syncthreads();\n", "if (threadIdx.x == 0) slots"
CLIP = "grad_clip_cuda.cu"
OVERRUN, PAST = "i < vectors; i", "heap-buffer-overflow"
FAULTS = [
    Fault("a barrier left out", "thread", "data race", "reduce.cuh", BARRIER, ""),
    Fault("two threads, one slot", "thread", "data race", "grad_norm_cuda.cu", ONE_WRITES, "slots"),
    Fault("a read past the end", "address", PAST, "grad_norm_cuda.cu", OVERRUN, "i <= vectors; i"),
    Fault(
        "a write past the end", "address", PAST, "grad_clip_cuda.cu", OVERRUN, "i <= vectors; i", "grad_clip_cuda.cu"
    ),
    Fault("a misaligned load", "address", "misaligned address", "grad_norm_cuda.cu", "(N - mis", "(mis"),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def encode(values: np.ndarray, kind: str) -> bytes:
    """float64 values as the bytes of that type, to nearest."""
    if kind == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).tobytes()
    return values.astype({"f32": "f4", "f64": "f8", "f16": "f2"}[kind]).tobytes()


def decode(data: bytes, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"f32": "f4", "f64": "f8", "f16": "f2"}[kind]).astype(np.float64)


@dataclass
class Case:
    """Gradients as (kind, bytes, offset in bytes, position), rows over them, and bounds for the first rows."""

    gradients: list[tuple[str, bytes, int, int]]
    rows: list[tuple[int, int, int]]
    bounds: list[float] = field(default_factory=list)
    inv_scale: float = 1.0
    scalar: tuple[int, float] = (0, 0.0)
    bounds_on_device: bool = False

    @property
    def wide(self) -> bool:
        return any(kind == "f64" for kind, *_ in self.gradients)

    def write(self, path: Path) -> None:
        sizes = len(self.gradients), len(self.rows), len(self.bounds)
        parts = [struct.pack("<6q", *sizes, self.scalar[0], self.wide, self.bounds_on_device)]
        parts.append(struct.pack("<2d", self.inv_scale, self.scalar[1]))
        for kind, data, offset, position in self.gradients:
            number, item = KINDS[kind]
            parts += [struct.pack("<4q", number, len(data) // item, offset, position), data]
        parts += [struct.pack("<3q", *row) for row in self.rows]
        parts += [struct.pack("<d", bound) for bound in self.bounds]
        path.write_bytes(b"".join(parts))


@dataclass
class Result:
    norm: np.ndarray
    max_abs: np.ndarray
    inv_scale: np.ndarray
    nonfinite: np.ndarray
    first: np.ndarray
    clipped: list[np.ndarray]
    raw: bytes


def compile_(source: Path, sanitizer: str, target: Path, *include: Path) -> Path:
    command = ["g++", "-std=c++17", "-g", "-pthread", *SANITIZERS[sanitizer], "-Wall", "-Wextra", "-Werror"]
    # the kernels' own pragmas, and CUDA's extension of them, mean nothing to the host compiler
    command += ["-Wno-unknown-pragmas", *(f"-I{folder}" for folder in (SHIM, *include, CSRC))]
    # the 4 KiB of kernel argument of older toolkits: several launches with few tensors
    command += ["-DCUDART_VERSION=11080", "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def link(objects: Iterable[Path], sanitizer: str, target: Path) -> Path:
    command = ["g++", "-pthread", *SANITIZERS[sanitizer], *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class Programs:
    """The driver and the kernels for each sanitizer, compiled when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.objects: dict[str, dict[str, Path]] = {}

    def get(self, sanitizer: str) -> Path:
        target = self.folder / f"driver-{sanitizer}"
        if sanitizer not in self.objects:
            sources = (SHIM / "driver.cpp", CSRC / "grad_norm_cuda.cu", CSRC / "grad_clip_cuda.cu")
            self.objects[sanitizer] = {
                source.name: compile_(source, sanitizer, self.folder / f"{source.stem}-{sanitizer}.o")
                for source in sources
            }
            link(self.objects[sanitizer].values(), sanitizer, target)
        return target

    def with_fault(self, fault: Fault, folder: Path) -> Path:
        """The same program with one file's text changed."""
        self.get(fault.sanitizer)
        text = (CSRC / fault.file).read_text()
        assert fault.before in text
        (folder / fault.file).write_text(text.replace(fault.before, fault.after))
        # the changed header is found first, by the copy of the kernel beside it
        kernel = folder / fault.kernel
        if not kernel.exists():
            kernel.write_text((CSRC / fault.kernel).read_text())
        objects = dict(self.objects[fault.sanitizer])
        objects[fault.kernel] = compile_(kernel, fault.sanitizer, folder / "faulty.o", folder)
        return link(objects.values(), fault.sanitizer, folder / f"faulty-{fault.sanitizer}")


def launch(program: Path, case: Case, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    case.write(folder / "case")
    # ThreadSanitizer's memory map wants addresses that are not randomised
    prefix = ["setarch", "-R"] if "thread" in program.name and shutil.which("setarch") else []
    return subprocess.run(
        [*prefix, str(program), str(folder / "case"), str(folder / "result")],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def run(program: Path, case: Case, folder: Path, **environment: str) -> Result:
    done = launch(program, case, folder, **environment)
    assert done.returncode == 0, done.stderr[:4000]
    raw = (folder / "result").read_bytes()
    count = len(case.rows)
    values = np.frombuffer(raw, np.float64, 3 * count).reshape(3, count)
    counts = np.frombuffer(raw, np.int64, 2 * count, 24 * count).reshape(2, count)
    clipped, at = [], 40 * count
    for kind, data, _, _ in case.gradients:
        clipped.append(decode(raw[at : at + len(data)], kind))
        at += len(data)
    assert at == len(raw)
    return Result(*values, *counts, clipped, raw)


def check(case: Case, result: Result) -> None:
    """Every number against 80-bit arithmetic, whose range no float64 square leaves."""
    decoded = [decode(data, kind) for kind, data, _, _ in case.gradients]
    scale = case.inv_scale * (case.scalar[1] if case.scalar[0] else 1.0)
    out = np.float64 if case.wide else np.float32
    for r, (begin, end, base) in enumerate(case.rows):
        values = [decoded[i] for i in range(begin, end)]
        every = np.concatenate([*values, np.zeros(0)])
        with np.errstate(over="ignore", invalid="ignore"):
            norm = out(np.sqrt(np.square(every.astype(np.longdouble)).sum()) * np.longdouble(abs(scale)))
            largest = out(np.abs(every).max(initial=0.0) * abs(scale))
        bad = [case.gradients[i][3] for i in range(begin, end) if not np.isfinite(decoded[i]).all()]
        # what the docstring of GroupGradNorm promises
        np.testing.assert_allclose(result.norm[r], norm, rtol=4e-7, atol=np.finfo(out).tiny * 2e-6)
        np.testing.assert_allclose(result.max_abs[r], largest, rtol=1e-6, atol=np.finfo(out).tiny * 2e-6)
        assert result.nonfinite[r] == (~np.isfinite(every)).sum()
        assert result.first[r] == (min(bad) - base if bad else -1)
    for r, bound in enumerate(case.bounds):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            limit = np.float64(bound if bound >= 0 else np.nan)
            ratio = 1.0 if bound == np.inf else np.minimum(limit / (result.norm[r] + 1e-6), 1.0)
            factor = ratio * scale
            for i in range(*case.rows[r][:2]):
                kind = case.gradients[i][0]
                narrow = factor if kind == "f64" else np.float32(factor)
                product = decoded[i] * narrow if kind == "f64" else decoded[i].astype(np.float32) * narrow
                expected = decode(encode(product.astype(np.float64), kind), kind)
                # one unit in the last place where the factor itself was rounded otherwise
                unit = {"f32": 2**-23, "f64": 2**-52, "f16": 2**-10, "bf16": 2**-7}[kind]
                np.testing.assert_allclose(
                    result.clipped[i], expected, rtol=unit, atol=6e-8 if kind == "f16" else 1e-45
                )
                assert (result.clipped[i] != expected).sum() <= 0.02 * expected.size + np.isnan(expected).sum()
    for i in range(max((row[1] for row in case.rows[: len(case.bounds)]), default=0), len(decoded)):
        np.testing.assert_array_equal(result.clipped[i], decoded[i])


def ordinary(generator: np.random.Generator) -> Case:
    """Every type, at sizes around the vector, the block and the chunk, starting anywhere."""
    gradients = []
    for kind, (_, item) in KINDS.items():
        chunk = CHUNK_BYTES // item
        for size, offset in [(0, 0), (1, 1), (7, 0), (300, 3), (5000, 1), (chunk, 0), (chunk + 3, 1)]:
            data = encode(generator.standard_normal(size), kind)
            gradients.append((kind, data, offset * item, len(gradients) + 2))
    count = len(gradients)
    rows = [(0, 9, 2), (9, 20, 11), (20, count - 1, 22), (0, count, 0), (4, 4, 6), (0, 1, 2)]
    return Case(gradients, rows, bounds=[1.0, 1e9, np.inf], inv_scale=-0.5, scalar=(1, 0.25))


def extreme(generator: np.random.Generator) -> Case:
    """Values whose squares leave the range, NaN and Inf, one kind of trouble a row."""
    gradients, rows = [], []
    for kind, scales in {
        "f32": [1e-42, 1e-25, 1e30, 3e38],
        "f64": [1e-310, 1e-200, 1e153, 1e300],
        "f16": [6e-8, 6e4],
        "bf16": [1e-39, 3e38],
    }.items():
        for scale in scales:
            for bad in (None, np.nan, np.inf):
                values = generator.uniform(-1, 1, 1003) * scale
                if bad is not None:
                    values[[5, 1002]] = bad, -bad
                rows.append((len(gradients), len(gradients) + 2, len(gradients)))
                gradients.append((kind, encode(np.ones(2) * scale, kind), 0, len(gradients)))
                gradients.append((kind, encode(values, kind), 0, len(gradients)))
    rows.append((0, len(gradients), 0))
    # each square fits, their sum does not
    rows.append((len(gradients), len(gradients) + 4, 0))
    gradients += [("f64", encode(np.full(1, 1.1e154), "f64"), 0, 0)] * 4
    return Case(gradients, rows, scalar=(2, 2.0**-10))


def many(generator: np.random.Generator) -> Case:
    """More tensors and rows than one launch takes."""
    gradients = [("f32", encode(generator.standard_normal(3), "f32"), 0, i) for i in range(150)]
    rows = [(i, i + 1, i) for i in range(150)] + [(i, i + 80, 0) for i in range(0, 70, 5)]
    return Case(gradients, rows, bounds=[0.5] * 150)


def alike(generator: np.random.Generator) -> Case:
    """Elements whose roundings all go one way, a chunk and more of them; bounds that the device made."""
    gradients = []
    for kind, (_, item) in KINDS.items():
        for value in (1.3675, 1.4275, 1.815, 1.1):
            gradients.append((kind, encode(np.full(CHUNK_BYTES // item + 1000, value), kind), item, len(gradients)))
    count = len(gradients)
    bounds = [0.5, np.inf, 1e9, np.nan, -1.0, 0.0] + [1.0] * (count - 6)
    return Case(gradients, [(i, i + 1, i) for i in range(count)], bounds, bounds_on_device=True)


CASES = {"ordinary": ordinary, "extreme": extreme, "many": many, "alike": alike}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.mktemp("cuda_on_host"))


# each case is compared with 80-bit arithmetic under AddressSanitizer; many blocks are slow under ThreadSanitizer, and
# race no more than one does
RUNS = [("address", name) for name in CASES] + [("thread", name) for name in CASES if name != "many"]


@pytest.mark.parametrize(("sanitizer", "name"), RUNS)
def test_kernels_on_the_host(programs: Programs, tmp_path: Path, sanitizer: str, name: str) -> None:
    case = CASES[name](np.random.default_rng(0))
    check(case, run(programs.get(sanitizer), case, tmp_path))


def test_blocks_may_run_in_any_order(programs: Programs, tmp_path: Path) -> None:
    case = ordinary(np.random.default_rng(1))
    forward = run(programs.get("plain"), case, tmp_path)
    check(case, forward)
    assert forward.raw == run(programs.get("plain"), case, tmp_path, QF_REVERSE_BLOCKS="1").raw


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_caught(programs: Programs, tmp_path: Path, fault: Fault) -> None:
    values = np.random.default_rng(0).standard_normal(2051)
    case = Case([("f32", encode(values, "f32"), 4, 0)], [(0, 1, 0)], bounds=[1.0])
    done = launch(programs.with_fault(fault, tmp_path), case, tmp_path)
    assert done.returncode != 0 and fault.complaint in done.stderr, done.stderr[:4000]
