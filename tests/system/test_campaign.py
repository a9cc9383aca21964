"""The GPU campaign: its stages on the CPU, one that fails leaves the others alone, and its table tells.

The whole dry run is marked `slow`, and so is out of the default suite: pytest -m slow tests/system/test_campaign.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_campaign.sh"


def campaign(out: Path, *line: str, **environment: str) -> tuple[int, str, dict[str, dict]]:
    """Exit code, output, and the summary's stages by name."""
    variables = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(["bash", str(SCRIPT), *line], capture_output=True, text=True, env=variables, timeout=620)
    summary = out / "summary.json"
    stages = json.loads(summary.read_text()) if summary.exists() else []
    return done.returncode, done.stdout + done.stderr, {stage["stage"]: stage for stage in stages}


def test_stages_pass_and_are_told(tmp_path):
    code, out, stages = campaign(tmp_path, "--cpu", "gradcheck", "ncu")
    assert code == 0, out
    assert {name: stage["status"] for name, stage in stages.items()} == {"gradcheck": "passed", "ncu": "skipped"}
    assert "5 inputs in float64" in stages["gradcheck"]["figure"] and "5 inputs in float64" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "summary.json", "summary.md"]


def test_a_failed_stage_leaves_the_others_alone(tmp_path):
    broken = "import sys\nif 'machine' in sys.argv:\n    print('figure: broken on purpose')\n    raise SystemExit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    code, out, stages = campaign(tmp_path / "out", "--cpu", "machine", "ncu", PYTHONPATH=str(tmp_path))
    assert code == 1 and "1 of 2 stages failed: machine" in out
    assert stages["machine"]["status"] == "failed" and stages["machine"]["figure"] == "broken on purpose"
    assert stages["ncu"]["status"] == "skipped"


def without(folder: Path, *modules: str) -> str:
    """A folder for PYTHONPATH under which the modules are as if they were not installed."""
    lines = [f"sys.modules[{module!r}] = None" for module in modules]
    (folder / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    return str(folder)


def test_what_a_stage_lacks_is_named_and_the_stage_skipped(tmp_path):
    path = without(tmp_path, "peft", "rich", "tyro")
    code, out, stages = campaign(tmp_path / "out", "--cpu", "machine", "sync", "train-tiny", PYTHONPATH=path)
    assert code == 0, out
    assert [stage["status"] for stage in stages.values()] == ["passed", "skipped", "skipped"]
    assert "missing: tyro" in stages["machine"]["figure"]
    assert stages["sync"]["figure"] == "for want of peft" and stages["train-tiny"]["figure"] == "for want of peft, rich"


def test_test_files_that_lack_a_module_are_left_out_and_slips_are_not(tmp_path):
    (tmp_path / "test_a.py").write_text("import tyro\n\ndef test_a(): pass\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    (tmp_path / "test_c.py").write_text("import no_such_helper\n")
    path = os.pathsep.join([without(tmp_path, "tyro"), str(ROOT / "bench"), str(ROOT)])
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "left_out", "--continue-on-collection-errors"]
    done = subprocess.run(
        [*line, "--rootdir", str(tmp_path), str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    assert "left out for want of tyro" in done.stdout and "1 passed, 1 skipped, 1 error" in done.stdout, done.stdout
    assert "no_such_helper" in done.stdout


def test_bad_arguments_get_one_sentence(tmp_path):
    code, out, stages = campaign(tmp_path, "--gpu")
    assert code == 2 and not stages
    assert out.startswith("gpu_campaign: argument must be --cpu or one of machine ") and "got --gpu" in out


def test_every_stage_is_in_a_part():
    lines = SCRIPT.read_text().splitlines()
    stages = next(line for line in lines if line.startswith("STAGES=")).split('"')[1].split()
    parts = [line.split('"')[1].split() for line in lines if ']="machine' in line]
    assert len(parts) == 4 and {stage for part in parts for stage in part} == set(stages)


@pytest.mark.slow
@pytest.mark.timeout(620)
def test_a_dry_run_passes_through_every_stage(tmp_path):
    code, out, stages = campaign(tmp_path, "--cpu")
    assert code == 0, out
    named = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("STAGES="))
    assert list(stages) and set(stages) == set(named.split('"')[1].split())
    assert {name for name, stage in stages.items() if stage["status"] != "passed"} == {"ncu", "tune"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size <= 16e6 for path in files)
