"""Run a folder of scripts that call `qf.prove`, each in a process of its own, and print what was said of each.

    python tests/proof/run_cases.py FOLDER [PART_OF_A_NAME]

The first line of a script is a comment with the right answer; it is printed beside the verdict, rung and line, for a
person to compare. Exit code 1 where a script ended in anything but a ValueError of the proof's own.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

import qwen_fused as qf
from qwen_fused.proof.ladder import ProofReport

SECONDS = 200


def told(report: ProofReport) -> list[str]:
    """A report in a few lines: the verdict, what is wrong or not judged, the notes."""
    lines = [f"{report.verdict}, {report.evaluations} evaluations, {report.seconds:.1f} s"]
    for name, rung in report.rungs.items():
        if rung.ok is not True and rung.asked:
            lines.append(f"  {name}: {rung.detail}")
        lines += [f"    {f.kind}: {f.detail} at {f.frame}" for f in rung.findings]
    return lines + [f"  note: {note}" for note in report.notes]


def run(script: Path) -> int:
    """Run one script in this process; 0 when it ended as a script may."""
    warnings.simplefilter("ignore")
    original = qf.prove

    def watched(*args, **kwargs):
        report = original(*args, **kwargs)
        print("\n".join("    " + line for line in told(report)), flush=True)
        return report

    qf.prove = watched
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    try:
        sys.stdout = _Only(out)
        runpy.run_path(str(script), run_name="__main__")
    except ValueError as error:
        print(f"    ValueError: {error}", file=out, flush=True)
    except BaseException:
        print("    CRASHED: " + traceback.format_exc().strip().splitlines()[-1], file=out, flush=True)
        return 1
    finally:
        sys.stdout = out
    return 0


class _Only:
    """Standard output without what the scripts print of reports themselves."""

    def __init__(self, out):
        self._out = out

    def write(self, text: str) -> int:
        if text.startswith(("    ", "before", "after")):
            self._out.write(text.rstrip("\n") + "\n")
        return len(text)

    def flush(self) -> None:
        self._out.flush()


def in_child(script: Path) -> int:
    """Run one script in a forked process, which has torch already."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(script)
        finally:
            sys.stdout.flush()
            os._exit(code)
    started = time.monotonic()
    while time.monotonic() - started < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    print(f"    STOPPED after {SECONDS} s", flush=True)
    return 1


def main(folder: str, part: str = "") -> int:
    """Run them all; 1 when one crashed."""
    torch.set_num_threads(1)
    worst = 0
    for script in sorted(Path(folder).glob("*.py")):
        if part in script.name:
            print(f"{script.stem}\n  {script.read_text().splitlines()[0]}", flush=True)
            worst |= in_child(script)
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
