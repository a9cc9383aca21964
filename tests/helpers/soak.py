"""Kill a run at random moments, continue it each time, and compare what it comes to with an unbroken run bit for bit.

    python tests/helpers/soak.py --kills 20
    python tests/helpers/soak.py --kills 100 --batches 60 --seed 1 -- --prompt-window 10

What comes after `--` goes to `qwen-fused train`. A kill is SIGKILL at a random moment: most within half of the time
that training takes, so that a run has several, one in eight anywhere up to the report; and one in four waits from there
until a file is half written. A run that gets to its end is compared, and another is begun until there were enough
kills. Exit code 0 when every run was equal, 1 when one was not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# a child forked beside another thread's OpenMP pool would wait for it for ever; torch reads this as it loads
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from small_runs import SMALL, flags, fork, rows, write_small_qwen, write_small_tasks

from qwen_fused.cli import main as cli
from qwen_fused.train import loop  # noqa: F401  imported once, for every child
from qwen_fused.train.checkpoint import list_checkpoints, read_state

COMPARED = ("gradients.jsonl", "predictions.jsonl", "evaluation.json", "submission.json", "examples.json")


class Soak:
    """Runs of one configuration, each in a process of its own that starts from this one with everything imported."""

    def __init__(self, root: Path, arguments: list[str]):
        self.root, self.arguments = root, arguments
        self.output = root / "output.txt"
        self.where: Counter[str] = Counter()

    def start(self, *extra: str) -> int:
        """Start `qwen-fused train`; returns its process."""
        return fork(lambda: cli.main(["train", *self.arguments, *extra]), self.output)

    def finish(self, process: int) -> None:
        """Wait for a run's end, which must be a good one."""
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status != 0:
            sys.exit(f"a run ended with {status}:\n{self.output.read_text()}")

    def kill(self, process: int, folder: Path, seconds: float, aimed: bool) -> bool:
        """Kill a run after so many seconds, and aimed ones when a file is half written; False if it ended before."""
        due = time.monotonic() + seconds
        while time.monotonic() < due or (aimed and not any(folder.rglob(".partial-*"))):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                if os.waitstatus_to_exitcode(status) != 0:
                    sys.exit(f"a run ended badly:\n{self.output.read_text()}")
                return False
            time.sleep(0.0005 if aimed else 0.005)
        os.kill(process, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        self.where[self.moment(folder)] += killed
        return killed

    def moment(self, folder: Path) -> str:
        """Where in a run the kill came, from what it has left."""
        if any(folder.rglob(".partial-*")):
            return "with a file half written"
        if not any(folder.rglob("step-*.safetensors")):
            return "before the first checkpoint"
        return "after the last batch" if any(folder.rglob("evaluation.json")) else "in between"


def only_run(out: Path) -> Path | None:
    """The run folder in `out`, if the run got as far as its config.yaml."""
    found = [path.parent for path in out.glob("*/config.yaml")]
    return found[0] if found else None


def difference(one: Path, other: Path) -> str | None:
    """The first thing in which two finished runs differ."""
    if rows(one) != rows(other):
        return "metrics.jsonl"
    for name in COMPARED:
        if (one / name).read_bytes() != (other / name).read_bytes():
            return name
    last = [list_checkpoints(run / "checkpoints")[-1] for run in (one, other)]
    best = [run / "checkpoints" / "best.safetensors" for run in (one, other)]
    for one_file, other_file in (last, best):
        if one_file.name != other_file.name:
            return f"{one_file.name} and {other_file.name}"
        found = unequal(read_state(one_file), read_state(other_file))
        if found:
            return f"{one_file.name}{found}"
    return None


def unequal(one: Any, other: Any, at: str = ":") -> str | None:
    """Where two states of tensors and plain values in dicts and lists differ in a bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return None if same and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)) else at
    if type(one) is not type(other):
        return at
    if isinstance(one, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return at
        return next((place for k in one if (place := unequal(one[k], other[k], f"{at}/{k}"))), None)
    return None if one == other or (one != one and other != other) else at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--batches", type=int, default=60, help="length of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    parser.add_argument("flags", nargs="*", help="after --: flags of qwen-fused train")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        return soak(root, options)
    finally:
        if options.keep:
            print(f"runs are in {root}")
        else:
            shutil.rmtree(root)


def soak(root: Path, options: argparse.Namespace) -> int:
    """Kill, continue, compare; returns the exit code."""
    began, random_moment = time.monotonic(), random.Random(options.seed)
    # checkpoints fall within prompt windows as well as at their ends
    often = dict(checkpoint_every=3, prompt_window=4, eval_every=2, max_batches=options.batches, prove=False)
    tasks, qwen = write_small_tasks(root / "tasks"), write_small_qwen(root / "qwen")
    work = Soak(root, [*flags(dataset=tasks, qwen=qwen, **{**SMALL, **often}), *options.flags])
    started = time.time()
    work.finish(work.start("--out", str(root / "unbroken")))
    length = time.time() - started
    unbroken = only_run(root / "unbroken")
    assert unbroken is not None
    last = list_checkpoints(unbroken / "checkpoints")[-1].name
    training = (unbroken / "checkpoints" / last).stat().st_mtime - started
    print(f"unbroken: {len(rows(unbroken))} batches in {training:.1f} s, {length:.1f} s with evaluation and report")

    kills, runs, resumes = 0, 0, 0
    while kills < options.kills or runs == 0:
        out = root / f"run-{runs}"
        finished = False
        while not finished:
            folder = only_run(out)
            resumes += folder is not None
            process = work.start(*(["--resume", str(folder)] if folder else ["--out", str(out)]))
            trained = folder is not None and (folder / "checkpoints" / last).exists()
            # most kills should come while it trains, and none keep a run from its end for ever
            if kills >= options.kills or (trained and random_moment.random() < 0.75):
                work.finish(process)
                finished = True
                continue
            aimed = random_moment.random() < 0.25
            span = length if random_moment.random() < 0.125 else training / 2
            killed = work.kill(process, out, random_moment.uniform(0, span), aimed)
            kills, finished = kills + killed, not killed
            if killed:
                done = only_run(out)
                batches = len((done / "metrics.jsonl").read_text().splitlines()) if done else 0
                print(f"kill {kills} of {options.kills}: run {runs + 1}, some {batches} batches in")
        run = only_run(out)
        assert run is not None
        runs += 1
        different = difference(unbroken, run)
        if different:
            print(f"run {runs} is not the unbroken run: {different}")
            return 1
        print(f"run {runs} is the unbroken run, bit for bit")
    moments = ", ".join(f"{count} {moment}" for moment, count in work.where.items())
    print(
        f"{kills} kills ({moments}), {resumes} resumes, {runs} run(s) of {options.batches} batches: weights, "
        f"optimizer, generators, metrics, evaluation and submission equal bit for bit; {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
