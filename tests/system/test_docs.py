"""The pages in docs/ say what the code is: the API page and the architecture page are up to date."""

from __future__ import annotations

import ast
import dataclasses
import functools
import graphlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import qwen_fused

ROOT = Path(__file__).resolve().parents[2]
LAYER = re.compile(r"^\| \d+ \| (.*?) \|", re.MULTILINE)


def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == make_api().render(), "run `make docs`"


@pytest.mark.parametrize("name", qwen_fused.__all__)
def test_docstring_names_every_argument(name: str) -> None:
    public = getattr(qwen_fused, name)
    members = [value for _, value in make_api().members_of(public)] if inspect.isclass(public) else []
    for item in [public, *members]:
        text = inspect.getdoc(item) or ""
        assert text.partition("\n\n")[0].endswith("."), item
        # their fields are declared, and listed, one by one
        if isinstance(item, property | functools.cached_property) or dataclasses.is_dataclass(item):
            continue
        if item is qwen_fused.EFEOutput:
            continue
        for parameter in inspect.signature(item).parameters:
            assert parameter == "self" or re.search(rf"^    [\w, *]*\b{parameter}\b[\w, ]*: ", text, re.MULTILINE), (
                f"{item.__qualname__} says nothing of {parameter}"
            )


def modules() -> dict[str, Path]:
    """Every module by its name after `qwen_fused.`, kernels included."""
    package = ROOT / "qwen_fused"
    # rglob does not follow the link to kernels/
    files = {*package.rglob("*.py"), *(package / "kernels").glob("*.py")}
    found = {".".join(file.relative_to(package).with_suffix("").parts): file for file in sorted(files)}
    # names without code of their own
    return {name: file for name, file in found.items() if name.rpartition(".")[2] not in ("__init__", "__main__")}


def imports(name: str, file: Path, known: set[str]) -> set[str]:
    """Modules of ours that a module imports: inside functions, and for type checkers alone, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "qwen_fused"):
            # a relative import starts from the module's own package
            parts = [name.rpartition(".")[0]] if node.level else []
            base = ".".join([*parts, (node.module or "").removeprefix("qwen_fused")]).strip(".")
            found |= {base} | {f"{base}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("qwen_fused.") for alias in node.names if "qwen_fused" in alias.name}
    return found & known


def room(name: str) -> str:
    return name.partition(".")[0]


def test_imports_go_one_way_as_the_architecture_page_says() -> None:
    files = modules()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`([\w.]+)`", row) for row in LAYER.findall(page)]
    level = {name: number for number, row in enumerate(rows, start=1) for name in row}
    # the old address of a public name, which imports it back down
    files.pop("masters")
    assert sorted(name for row in rows for name in row) == sorted({room(name) for name in files}), "each room once"
    graph = {name: imports(name, file, set(files)) for name, file in files.items()}
    assert "kernels.efe_tile" in graph["kernels.efe_forward"] and "config" in graph["qwen.memory"]
    upwards = [
        f"{name} imports {other}"
        for name in graph
        for other in graph[name]
        if level[room(other)] < level[room(name)]
        or (level[room(other)] == level[room(name)] and room(other) != room(name))
    ]
    assert not upwards, upwards
    # raises where imports go in a circle
    graphlib.TopologicalSorter(graph).prepare()


def test_picture_names_modules_that_there_are() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    named = " ".join(re.findall(r'<text class="module".*?>(.*?)</text>', picture)).split()
    known = {part for name in modules() for part in (name, *name.split("."))}
    assert len(named) > 30
    assert set(named) - {"modules"} <= known
