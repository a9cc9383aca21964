"""`make sanitize` takes a quarter of an hour and is seldom run: what it compiles and plants must be what is there."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("sanitize_run", HERE / "sanitize" / "run.py")
run = importlib.util.module_from_spec(spec)
# dataclasses look their module up
sys.modules[spec.name] = run
spec.loader.exec_module(run)


@pytest.mark.parametrize("fault", run.FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_place(fault) -> None:
    assert fault.before in (run.CSRC / fault.file).read_text()
    assert fault.source in run.SOURCES


def test_every_source_of_the_cpu_is_compiled() -> None:
    there = {str(path.relative_to(run.CSRC)) for path in run.CSRC.rglob("*.cpp") if "_cuda" not in path.name}
    assert there == set(run.SOURCES)


def test_every_file_of_tests_is_there() -> None:
    for job in (*run.RUNS, *(fault.run for fault in run.FAULTS)):
        for name in job.tests:
            tree = ast.parse((run.ROOT / "tests" / name).read_text())
            assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
