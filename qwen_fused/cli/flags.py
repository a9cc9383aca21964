"""Flags to a configuration: over the defaults, --preset and --config, or over a resumed run's own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from qwen_fused.cli.presets import preset
from qwen_fused.config import TrainConfig, require

C = TypeVar("C")
T = TypeVar("T", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a configuration starts, before the other flags change it."""

    preset: str | None = None
    """Start from tiny, qwen2.5-0.5b, qwen2.5-1.5b-lora or seed (the original recipe's numbers)."""
    config: Path | None = None
    """YAML file of settings, over the preset; the other flags are over both."""
    print_config: bool = False
    """Print the configuration as YAML, and do nothing else."""


def parse(config_class: type[C], command: str, arguments: Sequence[str], default: C | None = None) -> C:
    """Parse one command's flags into its configuration."""
    if issubclass(config_class, TrainConfig) and {"-h", "--help"} & set(arguments):
        print(grouped_help(config_class, command), end="")
        raise SystemExit(0)
    options: dict[str, Any] = {"default": default} if default is not None else {}
    return tyro.cli(config_class, prog=f"qwen-fused {command}", args=list(arguments), **options)


def grouped_help(config_class: type, command: str) -> str:
    """The help of a command that has the flags of a run, under a line for each group of settings."""
    written = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8")
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(config_class, prog=f"qwen-fused {command}", args=["--help"])
    written.seek(0)
    # by flag, the docstring of its class of settings
    titles = {
        "--" + name.replace("_", "-"): (settings.__doc__ or "").split("\n")[0]
        for settings in config_class.__mro__
        if dataclasses.is_dataclass(settings)
        for name in settings.__dict__.get("__annotations__", {})
    }
    lines, title = [], None
    for line in written.read().splitlines():
        flag = line.strip("│ ").split(" ")[0].rstrip(",")
        if titles.get(flag, title) != title:
            title = titles[flag]
            # in a box where the terminal has letters for one
            left, rule, right = ("├─ ", "─", "┤") if line.startswith("│") else (" - ", "-", "-")
            lines.append(f"{left}{title} ".ljust(len(line) - 1, rule) + right)
        lines.append(line)
    return "\n".join(lines) + "\n"


def parse_over_source(command_class: type[T], command: str, arguments: Sequence[str]) -> T:
    """Parse flags over --preset and --config; or, with --resume, over the run's own configuration."""
    # a first look at the flags that say what the others are over
    source, rest = tyro.cli(Source, args=list(arguments), return_unknown_args=True, add_help=False)
    base = preset(source.preset) if source.preset is not None else TrainConfig()
    if source.config is not None:
        base = TrainConfig.load(source.config, base)
    default = command_class(**{**fields_of(base, TrainConfig), **fields_of(source, Source)})
    parsed = parse(command_class, command, rest, default)
    if parsed.resume is None or parsed.resume == base.resume:
        return parsed
    require(
        source.preset is None and source.config is None, "resume",
        "alone, without --preset and --config: the run has its own configuration", str(parsed.resume),
    )  # fmt: skip
    from qwen_fused.train.resume import load_run_config, run_folder

    saved = load_run_config(run_folder(parsed.resume))
    own = {**fields_of(saved, TrainConfig), "resume": parsed.resume}
    return parse(command_class, command, rest, command_class(**{**own, **fields_of(source, Source)}))


def train_config(command: TrainConfig) -> TrainConfig:
    """The training configuration alone, of a command that has flags besides."""
    return TrainConfig(**fields_of(command, TrainConfig))


def fields_of(value: object, of: type) -> dict[str, Any]:
    """The fields of `of` by name, as `value` has them."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(of)}
