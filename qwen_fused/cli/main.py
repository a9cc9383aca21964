"""Command line: `qwen-fused train | solve | eval | export | prove | prove-script | bench | report | show | info`.

Exit codes are those of `EXIT_CODES`; what went wrong is one sentence on stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen_fused.cli.eval_command import run_eval
from qwen_fused.cli.flags import Source, parse, parse_over_source, train_config
from qwen_fused.cli.prove_script import run_prove_script
from qwen_fused.cli.solve_command import run_solve
from qwen_fused.common.typed_yaml import nearest
from qwen_fused.config import TrainConfig

EXIT_CODES = """\
exit codes
  0    done
  1    the run stopped (NaN, no memory, full disk), or the proof failed: stderr says why
  2    a flag, a setting or a file is wrong: stderr says which, nothing was started
  129  hung up, 130 interrupted, 143 terminated: a checkpoint was written, --resume goes on
  141  whoever read the output has gone"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a run's trained Qwen for plain transformers, or its LoRA adapters for plain peft."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """New folder for weights, configuration and tokenizer."""
    weights: Literal["last", "best"] = "last"
    """The newest checkpoint, or the best one on the held-out tasks."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig, Source):
    """Train on ARC tasks, evaluate on held-out ones, and write a report."""


@dataclass(frozen=True, kw_only=True)
class ProveCommand(TrainConfig, Source):
    """Prove that the gradient of the trainer's own step reaches Qwen and is right; exit code 0 or 1."""

    json: Path | None = None
    """File for the report as JSON."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw a run's report again."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    picture: Path | None = None
    """PNG file for one picture of the whole run: curves, gradient by layer, answers."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Draw one task, and a run's answers to it, in the terminal and as a PNG."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Id of an ARC task."""
    run: Path | None = None
    """Run folder whose model answers; without one the task alone is drawn."""
    dataset: str | None = None
    """Where the task is: arc1, arc2, a folder or a file, as for eval; the run's dataset, or arc1."""
    weights: Literal["last", "best"] = "last"
    """The newest checkpoint, or the best one on the held-out tasks."""
    png: Path | None = None
    """PNG file to write; RUN/show/TASK.png with a run, and none without."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say as JSON what is built, what is used on this machine, and why not the rest."""


def run_train(arguments: Sequence[str]) -> int:
    """`qwen-fused train`."""
    command = parse_over_source(TrainCommand, "train", arguments)
    config = train_config(command)
    if command.print_config:
        print(config.to_yaml(), end="")
        return 0
    from qwen_fused.train.loop import train
    from qwen_fused.train.trainer import TrainingStopped

    try:
        train(config)
    except TrainingStopped as stopped:
        print(f"qwen-fused: {stopped}", file=sys.stderr)
        return 1
    return 0


def run_export(arguments: Sequence[str]) -> int:
    """`qwen-fused export`."""
    config = parse(ExportConfig, "export", arguments)
    from qwen_fused.train.saved import export_qwen

    print(f"Exported: {export_qwen(config.run, config.folder, config.weights)}")
    return 0


def run_prove(arguments: Sequence[str]) -> int:
    """`qwen-fused prove`: the ladder of the trainer's own step, under any of the flags of train."""
    command = parse_over_source(ProveCommand, "prove", arguments)
    config = train_config(command)
    if command.print_config:
        print(config.to_yaml(), end="")
        return 0
    from qwen_fused.train.prove_trainer import prove_trainer
    from qwen_fused.train.trainer import Trainer

    report = prove_trainer(Trainer(config, config.out))
    print(report)
    if command.json is not None:
        command.json.write_text(json.dumps(report.to_dict(), indent=2))
    return 0 if report.ok else 1


def run_bench(arguments: Sequence[str]) -> int:
    """`qwen-fused bench`: the suite in a checkout's bench/, in a process of its own."""
    suite = Path(__file__).resolve().parents[2] / "bench" / "suite.py"
    if not suite.is_file():
        raise ValueError(f"bench needs a checkout of qwen-fused installed with pip install -e, got no {suite}")
    return subprocess.run([sys.executable, str(suite), *arguments]).returncode


def run_report(arguments: Sequence[str]) -> int:
    """`qwen-fused report`."""
    config = parse(ReportConfig, "report", arguments)
    from qwen_fused.report.page import write_report
    from qwen_fused.report.run_files import check_run

    check_run(config.run)
    print(f"Report: {write_report(config.run)}")
    if config.picture is not None:
        from qwen_fused.report.curves import to_png
        from qwen_fused.report.poster import draw_poster

        config.picture.write_bytes(to_png(draw_poster(config.run), dpi=110))
        print(f"Picture: {config.picture}")
    return 0


def run_show(arguments: Sequence[str]) -> int:
    """`qwen-fused show`."""
    config = parse(ShowConfig, "show", arguments)
    from rich.console import Console

    from qwen_fused.report.run_files import check_run
    from qwen_fused.report.show import describe_task, find_task, print_rows, write_png

    model, dataset, png = None, config.dataset or "arc1", config.png
    if config.run is not None:
        from qwen_fused.train.resume import load_run_config

        check_run(config.run)
        dataset = config.dataset or load_run_config(config.run).dataset
    # the task first: a wrong name is told before a model is built
    task = find_task(dataset, config.task)
    if config.run is not None:
        from qwen_fused.common.device import resolve_device
        from qwen_fused.common.files import safe_name
        from qwen_fused.train.saved import load_model

        model = load_model(config.run, config.weights, resolve_device(config.device))
        png = png or config.run / "show" / f"{safe_name(task.id)}.png"
        png.parent.mkdir(exist_ok=True)
    rows = describe_task(task, model)
    print_rows(rows, Console(highlight=False))
    if png is not None:
        write_png(png, task, rows)
        print(f"Picture: {png}")
    return 0


def run_info(arguments: Sequence[str]) -> int:
    """`qwen-fused info`."""
    parse(InfoConfig, "info", arguments)
    from qwen_fused.backends import describe

    print(json.dumps(describe(), indent=2))
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (run_train, "train on ARC tasks, evaluate, and write a report"),
    "solve": (run_solve, "answer tasks by training on each, and write submission.json and a page"),
    "eval": (run_eval, "evaluate a run and write submission.json"),
    "export": (run_export, "export a run's Qwen for plain transformers or peft"),
    "prove": (run_prove, "prove that the gradient of the training step reaches Qwen"),
    "prove-script": (run_prove_script, "the same of somebody's own script, up to its first optimizer step"),
    "bench": (run_bench, "measure the kernels, the prompt window and the training step on this machine"),
    "report": (run_report, "draw a run's report again, or one picture of it"),
    "show": (run_show, "draw one task, and a run's answers to it, in the terminal and as a PNG"),
    "info": (run_info, "what is built and used on this machine"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not sys.stderr.isatty():
        # read when transformers and the hub's client are imported: no bars of theirs in a log
        for library in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(library, "1")
    if arguments[:1] in (["--version"], ["-V"]):
        from qwen_fused import __version__

        print(f"qwen-fused {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: qwen-fused COMMAND [flags], with --help after a command for its flags; --version\n")
        print("\n".join(f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()))
        print(f"\n{EXIT_CODES}")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        known = f"command must be one of {', '.join(COMMANDS)}"
        print(f"qwen-fused: {known}, got {arguments[0]!r}{nearest(arguments[0], COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[arguments[0]][0](arguments[1:])
    except BrokenPipeError:
        # nobody reads on, as after `| head`; what is still in the buffer must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"qwen-fused: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from qwen_fused.train.monitor import out_of_memory

        hint = out_of_memory(error)
        if hint is None:
            raise
        print(f"qwen-fused: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
