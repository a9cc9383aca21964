"""Write docs/api.md from the docstrings of the public names and of the commands: `make docs`.

A page that is out of date fails `tests/system/test_docs.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mdformat

import qwen_fused
from qwen_fused.cli import main as cli
from qwen_fused.cli.eval_command import EvalConfig
from qwen_fused.cli.prove_script import ProveScriptConfig
from qwen_fused.cli.solve_command import SolveCommand
from qwen_fused.config import TrainConfig
from qwen_fused.norms.stats import PendingStats
from qwen_fused.proof.cuts import Cut
from qwen_fused.proof.frames import Frame
from qwen_fused.proof.ladder import Finding, Rung

PAGE = Path(__file__).resolve().parent / "api.md"
# what the public names hand out
HANDED_OUT = (PendingStats, Rung, Finding, Cut, Frame)
FLAGS = {
    "train": cli.TrainCommand,
    "solve": SolveCommand,
    "eval": EvalConfig,
    "export": cli.ExportConfig,
    "prove": cli.ProveCommand,
    "prove-script": ProveScriptConfig,
    "report": cli.ReportConfig,
    "show": cli.ShowConfig,
}
NOTES = {
    "prove": "Every flag of `train`, and:",
    "prove-script": "More in [proof_elsewhere.md](proof_elsewhere.md). Flags stand in front of the script:",
    "bench": "`qwen-fused bench --help` has its flags; it ends with the suite's own code.",
    "info": "No flags; prints JSON.",
}
MEMBERS = (property, functools.cached_property, types.FunctionType)
SECTIONS = ("Args:", "Returns:", "Raises:")


def render() -> str:
    """The page."""
    public = [getattr(qwen_fused, name) for name in qwen_fused.__all__]
    classes, functions = split(public)
    parts = [
        "# API\n",
        "<!-- written by docs/make_api.py from the docstrings: change those, then `make docs` -->\n",
        "`import qwen_fused as qf` gives every name of the first two parts. B episodes, T planning steps, C classes, "
        "H × W canvas, G parameter groups, D prompt width; natural logarithms, so losses and entropies are in nats.\n",
        "## Functions\n",
        *(function_text(function) for function in functions),
        "## Classes\n",
        *(class_text(cls) for cls in classes),
        "## What these hand out\n",
        *(class_text(cls) for cls in HANDED_OUT),
        "## Commands\n",
        *commands_text(),
    ]
    # the form that `make lint` asks of every page
    options = {"wrap": 100, "number": True, "plugin": {"tables": {"compact_tables": True}}}
    return mdformat.text("\n".join(parts), options=options, extensions={"gfm", "tables"})


def split(values: list[Any]) -> tuple[list[type], list[Any]]:
    """Classes and functions, each in the order given."""
    return [v for v in values if inspect.isclass(v)], [v for v in values if not inspect.isclass(v)]


def function_text(function: Any) -> str:
    return f"### `qf.{function.__name__}`\n\n{signature_text(function)}\n{docstring_text(function)}"


def class_text(cls: type) -> str:
    """Signature where it is built by hand, docstring, fields, and public members."""
    name = f"qf.{cls.__name__}" if cls.__name__ in qwen_fused.__all__ else cls.__name__
    parts = [f"### `{name}`\n"]
    built = "__init__" in vars(cls) and not dataclasses.is_dataclass(cls) and not issubclass(cls, tuple)
    if built:
        parts.append(signature_text(cls))
    text = docstring_text(cls)
    parts.append(text.replace("**Args**", "**Fields**") if dataclasses.is_dataclass(cls) else text)
    fields = list(fields_of(cls))
    # where the docstring has them, the declarations would only say them again
    if fields and "Args:" not in inspect.getdoc(cls):
        parts += ["**Fields**\n"]
        parts += [f"- `{declared}`{': ' + text if text else ''}" for _, declared, text in fields]
        parts.append("")
    for member, value in members_of(cls):
        if not inspect.isfunction(value):
            parts.append(f"**`.{member}`**: {inline(value.__doc__)}\n")
        else:
            parts.append(f"#### `{name.removeprefix('qf.')}.{member}`\n\n{signature_text(value)}")
            parts.append(docstring_text(value))
    return "\n".join(parts)


def members_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Public properties and methods that the class itself defines."""
    for name, value in vars(cls).items():
        if not name.startswith("_") and isinstance(value, MEMBERS):
            yield name, value


def fields_of(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, declaration, and the string or comment at it, of each field in the body of a class."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, body = source.splitlines(), ast.parse(source).body[0].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = lines[node.end_lineno - 1].partition("  # ")[2]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = inline(following.value.value)
        yield node.target.id, ast.unparse(node), text


def signature_text(function: Any) -> str:
    """The call in a code block, one argument per line where it is long."""
    arguments, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            arguments, keyword_only = [*arguments, "*"], True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        declared = f"{stars}{parameter.name}: {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        arguments.append(declared + default)
    returned = inspect.signature(function).return_annotation
    arrow = f" -> {returned}" if isinstance(returned, str) and not inspect.isclass(function) else ""
    call = f"{function.__name__}({', '.join(arguments)}){arrow}"
    if len(call) > 100:
        call = f"{function.__name__}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){arrow}"
    return f"```python\n{call}\n```\n"


def docstring_text(documented: Any) -> str:
    """A docstring as Markdown: its sections become lists."""
    text, lines = [], inspect.getdoc(documented).splitlines()
    section = False
    for line in lines:
        if line.split(" ")[0] in SECTIONS:
            head, _, rest = line.partition(":")
            text += ["", f"**{head}**{':' + rest if rest else ''}", ""]
            section = True
        elif section and line.strip():
            depth = len(line) - len(line.lstrip())
            entry = re.match(r"    ([\w*][\w*, ]*): (.*)", line) if depth == 4 else None
            if entry:
                text.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                text.append(f"  {line.strip()}" if depth > 4 else line.strip())
        else:
            text.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip() + "\n"


def inline(text: str | None) -> str:
    return " ".join((text or "").split())


def commands_text() -> Iterator[str]:
    """The exit codes, and each command with its flags."""
    head, *codes = cli.EXIT_CODES.splitlines()
    yield f"`qwen-fused COMMAND [flags]`; `-` and `_` are the same in a flag. Every command has the {head} below.\n"
    yield "| code | meaning |\n|---|---|"
    for line in codes:
        numbers, meaning = re.findall(r"\b\d+\b", line), re.sub(r"\b\d+ +", "", line.strip())
        yield f"| {', '.join(numbers)} | {meaning} |"
    yield ""
    for name, (_, text) in cli.COMMANDS.items():
        about = inspect.getdoc(FLAGS[name]) if name in FLAGS else f"{text[0].upper()}{text[1:]}."
        yield f"### `qwen-fused {name}`\n\n{about}\n"
        if name in NOTES:
            yield f"{NOTES[name]}\n"
        flags = flags_of(FLAGS[name]) if name in FLAGS else {}
        shared = flags_of(cli.TrainCommand) if name == "prove" else {}
        rows = [(flag, row) for flag, row in flags.items() if flag not in shared]
        if rows:
            yield "| flag | default | |\n|---|---|---|"
            before = None
            for flag, (default, meaning, group) in rows:
                if group != before and group is not None:
                    yield f"| **{group.removesuffix('.')}** | | |"
                before = group
                yield f"| {flag} | {default} | {meaning} |"
            yield ""


def flags_of(cls: type) -> dict[str, tuple[str, str, str | None]]:
    """Flag -> default, meaning and, of the training configuration, group; nested settings with a point between."""
    settings = {base: inline(base.__doc__) for base in TrainConfig.__mro__[1:-1] if issubclass(cls, TrainConfig)}
    groups = {name: text for base, text in settings.items() for name in vars(base)["__annotations__"]}
    meanings = {name: text for base in reversed(cls.__mro__[:-1]) for name, _, text in fields_of(base)}
    rows = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            nested = field.default_factory()
            for name, _, text in fields_of(type(nested)):
                rows[f"`--{field.name}.{name}`"] = f"`{getattr(nested, name)}`", text, groups.get(field.name)
            continue
        positional = "Positional" in str(field.type)
        flag = f"`{field.name.upper()}`" if positional else f"`--{field.name.replace('_', '-')}`"
        default = "" if field.default in (dataclasses.MISSING, None, ()) else f"`{field.default}`"
        choices = re.findall(r"'(\w+)'", str(field.type)) if "Literal" in str(field.type) else []
        if choices:
            default += f" of {', '.join(f'`{choice}`' for choice in choices)}"
        if field.type == "bool":
            flag, default = f"{flag}, `--no-{field.name.replace('_', '-')}`", "yes" if field.default else "no"
        rows[flag] = default, meanings[field.name].replace("|", "\\|"), groups.get(field.name)
    return rows


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"Written: {PAGE}")
