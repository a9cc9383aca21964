"""Flags to a configuration: over the defaults, --preset and --config, or over a resumed run's own."""

from __future__ import annotations

import dataclasses
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
    options: dict[str, Any] = {"default": default} if default is not None else {}
    return tyro.cli(config_class, prog=f"qwen-fused {command}", args=list(arguments), **options)


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
