"""`qwen-fused prove-script train.py [its arguments]`: somebody's own script, watched through its first step."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qwen_fused.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class ProveScriptConfig:
    """Run a training script, unchanged and with its own arguments, up to its first optimizer step, and print the
    ladder; exit code 0 or 1."""

    script: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")]
    """Python file; whatever follows it is its own."""
    allow: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What is intended, as in qf.prove: a parameter, function, line or operation; may be given again."""
    json: Path | None = None
    """File for the report as JSON."""


def run_prove_script(arguments: Sequence[str]) -> int:
    """`qwen-fused prove-script`."""
    ours, theirs = split(arguments)
    config = parse(ProveScriptConfig, "prove-script", ours)
    from qwen_fused.proof.script import prove_script

    run = prove_script(config.script, theirs, config.allow)
    if run.error:
        print(run.error, end="", file=sys.stderr)
    if run.report is not None:
        print(run.report)
        if config.json is not None:
            config.json.write_text(json.dumps(run.report.to_dict(), indent=2))
        return 0 if run.report.ok else 1
    if run.error:
        ended = "ended with the exception above"
    elif run.left_with is not None:
        ended = f"left with {run.left_with!r}"
    else:
        ended = "ended"
    print(f"qwen-fused: {config.script} {ended} before any torch optimizer stepped", file=sys.stderr)
    # as argparse leaves a script whose own arguments are wrong
    return 2 if run.left_with == 2 else 1


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our flags with the script, and the script's own arguments."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        alone = "=" in arguments[place] or arguments[place] in ("-h", "--help")
        place += 1 if alone else 2
    return list(arguments[: place + 1]), list(arguments[place + 1 :])
