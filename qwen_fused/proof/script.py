"""Run somebody else's script, unchanged, up to its first optimizer step, and say what became of the gradient."""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_fused.proof import frames
from qwen_fused.proof.ladder import ProofReport
from qwen_fused.proof.script_report import report_of
from qwen_fused.proof.script_watch import Finished, FirstStep


@dataclass
class ScriptRun:
    """How a script's run ended.

    Args:
        report: the ladder of its first step, or of a backward pass that failed before; None where there was neither.
        error: the script's own exception, as its traceback reads without a proof around it; empty where there is none.
        left_with: what the script gave `sys.exit` before its first step, or None.
    """

    report: ProofReport | None = None
    error: str = ""
    left_with: object = None


def prove_script(script: Path, arguments: Sequence[str] = (), allow: Iterable[str] = ()) -> ScriptRun:
    """Run a script as `python script arguments` would, and leave it after its first optimizer step.

    Compiled functions and modules run their source. The third rung looks at up to three steps more where a gradient is
    zero, the fifth where a scheduler begins at a learning rate of 0.

    Args:
        script: a Python file that makes a torch optimizer and steps it.
        arguments: its own.
        allow: as in `prove`.

    Raises:
        ValueError: when there is no such file.
    """
    if not script.is_file():
        raise ValueError(f"script must be a Python file, got {script}")
    started = time.perf_counter()
    seen = FirstStep()
    run = ScriptRun()
    with _as_a_script(script, arguments), warnings.catch_warnings(), seen.watching():
        try:
            frames.boundary(_run, str(script))
        except Finished:
            pass
        except SystemExit as left:
            run.left_with = left.code
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            run.error = _own_traceback(error)
    if seen.stepped or (seen.failed and run.error):
        run.report = report_of(seen, allow)
        run.report.seconds = time.perf_counter() - started
    return run


def _run(script: str) -> None:
    runpy.run_path(script, run_name="__main__")


@contextmanager
def _as_a_script(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Arguments, module path and environment as the script would find them, with compilation switched off."""
    argv, path, disabled = sys.argv, list(sys.path), os.environ.get("TORCHDYNAMO_DISABLE")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    # read when dynamo is imported, which takes seconds
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    dynamo = sys.modules.get("torch._dynamo")
    before = dynamo.config.disable if dynamo else False
    if dynamo:
        dynamo.config.disable = True
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path
        if disabled is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = disabled
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.config.disable = before


def _own_traceback(error: BaseException) -> str:
    """The traceback as it reads without the frames that ran the script and watched it."""
    told = traceback.TracebackException.from_exception(error)
    chain: list[traceback.TracebackException | None] = [told]
    while chain:
        link = chain.pop()
        if link is not None:
            own = [line for line in link.stack if not _is_ours(line.filename)]
            link.stack = traceback.StackSummary.from_list(own)
            chain += [link.__cause__, link.__context__]
    return "".join(told.format())


def _is_ours(file: str) -> bool:
    folder = os.path.dirname(os.path.abspath(__file__))
    return os.path.abspath(file).startswith(folder + os.sep) or file in (runpy.__file__, "<frozen runpy>")
