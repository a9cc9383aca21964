"""The package imports from anywhere, shadows nobody's `kernels`, and installs with and without torch and a compiler."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from qwen_fused import backends

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter that has left this process's sys.path behind."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_setup(*arguments: str, cwd: Path, **environment: str) -> str:
    """Everything that setup.py says, in a copy of the sources."""
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env=os.environ | {"QWEN_FUSED_REQUIRE_EXTENSION": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what git tracks of the package, links kept, with nothing built in it."""
    copy = tmp_path / "sources"
    copy.mkdir()
    skip = {"__pycache__", "build"}
    for name in ("setup.py", "pyproject.toml", "README.md", "csrc", "kernels", "qwen_fused"):
        for path in [ROOT / name, *sorted((ROOT / name).rglob("*"))] if (ROOT / name).is_dir() else [ROOT / name]:
            target = copy / path.relative_to(ROOT)
            if path.is_symlink():
                target.symlink_to(os.readlink(path))
            elif path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.suffix != ".so" and not skip & set(path.parts):
                target.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("from_root", [True, False])
def test_kernels_import_from_anywhere(tmp_path: Path, from_root: bool) -> None:
    code = "import qwen_fused.kernels.reference as m; print(m.__name__)"
    assert run_python(code, ROOT if from_root else tmp_path) == "qwen_fused.kernels.reference"


def test_top_level_kernels_is_left_alone(tmp_path: Path) -> None:
    # a regular package of that name elsewhere on the path wins over our folder even where ours is the working directory
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'hugging face'\n")
    code = "import qwen_fused.kernels.reference, kernels; print(kernels.owner)"
    assert run_python(code, ROOT, PYTHONPATH=str(tmp_path)) == "hugging face"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "qwen_fused" / "kernels") == "../kernels"


def test_transformers_imports_from_the_root() -> None:
    code = "import qwen_fused.kernels.reference, transformers.integrations.hub_kernels as h; print(h.__name__)"
    assert run_python(code, ROOT).endswith("hub_kernels")


def test_package_imports_no_trainer_until_it_is_asked_for() -> None:
    code = """
import sys
import qwen_fused as qf
assert {"ProveCallback", "testing", "lightning"} <= set(dir(qf))
qf.testing.assert_gradient, qf.GradientError
print(sorted({"transformers", "trl", "lightning", "accelerate"} & sys.modules.keys()))
qf.ProveCallback
print("transformers" in sys.modules, hasattr(qf, "nothing"))
"""
    assert run_python(code, ROOT).splitlines() == ["[]", "True False"]


def test_wheel_holds_every_module_and_no_stray_one(sources: Path, tmp_path: Path) -> None:
    run_setup("-q", "bdist_wheel", "--dist-dir", str(tmp_path), cwd=sources, CXX="no-such-compiler")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = [*(ROOT / "qwen_fused").rglob("*.py"), *(ROOT / "qwen_fused" / "kernels").glob("*.py")]
    assert len(modules) > 40
    assert not {str(module.relative_to(ROOT)) for module in modules} - set(names)
    # without the marker a user's type checker ignores our annotations
    assert {"qwen_fused/py.typed", "qwen_fused/report/report.html", "qwen_fused/report/solve.html"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qwen_fused"}


def test_setup_without_compiler_says_so_in_one_line(sources: Path) -> None:
    said = run_setup("-q", "build_ext", "--inplace", cwd=sources, CXX="no-such-compiler")
    (line,) = [line for line in said.splitlines() if line.startswith("qwen_fused:")]
    assert "no C++ compiler (no-such-compiler is not on PATH)" in line
    assert f'pip install --no-deps -e "{sources}"' in line
    assert not list(sources.rglob("*.so"))


def test_setup_without_torch_says_so_in_one_line(sources: Path) -> None:
    # a torch that can't be imported stands before the real one
    (sources / "torch.py").write_text("raise ImportError('No module named torch')\n")
    said = run_setup("-q", "build_ext", "--inplace", cwd=sources, PYTHONPATH=str(sources))
    (line,) = [line for line in said.splitlines() if line.startswith("qwen_fused:")]
    assert "no torch to build for" in line
    assert not list(sources.rglob("*.so"))


def test_setup_with_a_compiler_that_fails_installs_without(sources: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "CC": str(broken)}
    said = run_setup("-q", "build_ext", "--inplace", cwd=sources, **environment)
    assert "qwen_fused: installed without its C++ extension: the build failed" in said
    assert not list(sources.rglob("*.so"))
    with pytest.raises(AssertionError, match="the build failed"):
        run_setup("build_ext", "--inplace", cwd=sources, QWEN_FUSED_REQUIRE_EXTENSION="1", **environment)


def test_package_works_without_the_extension(sources: Path) -> None:
    code = (
        # an editable install of this checkout would offer its own _C to the copy
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import torch\n"
        "from qwen_fused import backends\n"
        "from qwen_fused.norms.group_grad_norm import GroupGradNorm\n"
        "p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])\n"
        "print(backends.HAS_EXTENSION, GroupGradNorm({'p': [p]}).measure().to_dict()['p']['norm'])\n"
        "print(backends.describe()['build the extension'])"
    )
    works, command = run_python(code, sources, CXX="no-such-compiler").splitlines()
    assert works == "False 5.0"
    assert command == f'{sys.executable} -m pip install --no-deps -e "{sources}"'


def test_extension_matches_what_is_installed() -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = (ROOT / "qwen_fused" / f"_C{suffix}").exists()
    assert built == backends.HAS_EXTENSION, backends.EXTENSION_ERROR
    assert backends.has_kernel("group_grad_norm", "cpu") == built
    assert not backends.has_op("no_such_op")
    if torch.version.cuda is None:
        assert not backends.EXTENSION_HAS_CUDA
    for name, value in backends.describe().items():
        assert value and "\n" not in value, name


@pytest.mark.skipif(not backends.HAS_EXTENSION, reason=f"no extension: {backends.EXTENSION_ERROR}")
def test_the_extension_says_what_it_was_built_with() -> None:
    built = backends.built_with()
    assert built.keys() == {"compiler", "instruction sets", "torch", "CUDA architectures"}
    assert built["torch"] == torch.__version__.partition("+")[0]
    assert (built["CUDA architectures"] == "none") == (not backends.EXTENSION_HAS_CUDA)
    report = backends.describe()
    assert all(report[f"extension: {name}"] == value for name, value in built.items())


def test_what_is_imported_is_declared() -> None:
    """A package that only comes along with another may stay away with the other's next version."""
    table = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]\n")[0]
    declared = {re.split(r"[><=;\s]", line.strip().strip('",'))[0] for line in table.strip().splitlines()}
    renamed = {"yaml": "pyyaml"}
    # offered where they are there, imported inside the function that wants them
    optional = {"accelerate", "lightning", "trackio", "wandb", "tensorboard", "pybind11"}
    imported = set()
    for file in [*(ROOT / "qwen_fused").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"qwen_fused"} - optional
    assert {"torch", "jinja2", "tokenizers"} <= foreign
    assert {renamed.get(name, name) for name in foreign} <= declared
