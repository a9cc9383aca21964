"""Seeds, tolerances per dtype, and the `gpu` marker, for every test."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path

# before torch loads OpenMP: threads that spin at barriers starve each other on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy as np
import pytest
import torch
from kaggle_files import write_kaggle
from small_runs import SMALL, write_small_qwen, write_small_tasks

# Triton reads this when it is imported; its kernels then run on CPU tensors
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# nothing here may reach for a model hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# nor draw bars between the sentences that tests look for on stderr
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# the terminal of whoever runs the tests is not the one that they are about
for name in ("FORCE_COLOR", "COLUMNS", "LINES"):
    os.environ.pop(name, None)

# the same examples at every run, so that a green main stays green; HYPOTHESIS_PROFILE=search draws new ones each time
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# against a float64 reference: one rounding of the output, plus what float32 accumulation loses
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
}


@pytest.fixture
def tolerance():
    """dtype -> keyword arguments of torch.testing.assert_close."""
    return TOLERANCES.__getitem__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # its keywords hold the names of its folders, too
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """A group that a test left behind would be every later test's, and every forked process's."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(params=["extension", "reference"])
def gradient_path(request, monkeypatch) -> str:
    """The compiled gradient ops, and then plain torch in their place."""
    from qwen_fused import backends

    if request.param == "reference":
        monkeypatch.setattr(backends, "has_kernel", lambda name, device: False)
    elif not backends.HAS_EXTENSION:
        pytest.skip(f"no extension: {backends.EXTENSION_ERROR}")
    return request.param


@pytest.fixture(params=["cpp", "triton-interpreted", pytest.param("triton-cuda", marks=pytest.mark.gpu)])
def fused(request) -> dict[str, str]:
    """Backend and device of a fused loss: Triton on the GPU where there is one, interpreted where there is none."""
    from qwen_fused import backends
    from qwen_fused.loss.dispatch import COMPILED

    if request.param == "cpp" and not COMPILED:
        pytest.skip(f"no extension: {backends.EXTENSION_ERROR}")
    if request.param == "triton-interpreted" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton is compiled")
    backend, _, where = request.param.partition("-")
    return {"backend": backend, "device": "cuda" if where == "cuda" else "cpu"}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch allocates for outputs starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def small_arc(tmp_path_factory) -> Path:
    """A folder of twelve real ARC tasks with small grids."""
    return write_small_tasks(tmp_path_factory.mktemp("arc"))


@pytest.fixture(scope="session")
def kaggle(tmp_path_factory) -> Path:
    """A folder as Kaggle hands it out: six tasks, whose answers are known as evaluation and unknown as test."""
    return write_kaggle(tmp_path_factory.mktemp("kaggle"))


@pytest.fixture(scope="session")
def small_qwen(tmp_path_factory) -> Path:
    """A folder with a Qwen of four layers, a quarter as wide as the tiny one."""
    return write_small_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def config_in(small_arc, small_qwen):
    """(folder for the run folders, keyword changes) -> a configuration that trains in milliseconds on real tasks."""
    from qwen_fused.config import TrainConfig

    def make(out: Path, **changes) -> TrainConfig:
        quiet = dict(out=out, checkpoint_every=1000, eval_every=0, prove=False)
        return TrainConfig(**{"dataset": str(small_arc), "qwen": str(small_qwen), **SMALL, **quiet, **changes})

    return make


@pytest.fixture
def small_config(config_in, tmp_path):
    """Keyword changes -> such a configuration, its run folders in the test's own folder."""
    return functools.partial(config_in, tmp_path / "runs")


@pytest.fixture
def unevaluated(monkeypatch) -> None:
    """Runs end with their last checkpoint: evaluation and report, most of a small run's time, are left out."""
    from qwen_fused.train import loop

    monkeypatch.setattr(loop, "finish", lambda *args: None)


@pytest.fixture(scope="session")
def held_out():
    """The default held-out tasks of arc1."""
    from qwen_fused.arc.reader import load_tasks
    from qwen_fused.arc.split import split_tasks

    return split_tasks(load_tasks("arc1").tasks, 0.1, 0)[1]


@pytest.fixture
def report_run(tmp_path, held_out) -> Path:
    """A whole run folder of known figures."""
    from report_runs import make_run

    return make_run(tmp_path / "run", held_out)
