"""Solve tasks from a run's weights, or from random ones: what `qf.solve` and `qwen-fused solve` do."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from qwen_fused.arc.reader import load_tasks
from qwen_fused.arc.tasks import Task, TaskCollection
from qwen_fused.common.device import resolve_device
from qwen_fused.config import TrainConfig, error_prefix, require
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.qwen.prompt_text import describe_cut
from qwen_fused.qwen.tiny import seeded
from qwen_fused.report.solve_log import SolveLog
from qwen_fused.solver.folder import RESULTS, SUBMISSION, SolveFolder, solve_folder
from qwen_fused.solver.page import write_page
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solution import Solution
from qwen_fused.solver.solve import solve_tasks
from qwen_fused.solver.task_planner import lines_agent
from qwen_fused.train.run_start import with_start
from qwen_fused.train.saved import load_model
from qwen_fused.train.signals import Interrupted, catch_signals


class SolveStopped(RuntimeError):
    """A solve ended early, in a sentence that says why and how to go on."""


def solve(
    tasks: str | Path | Sequence[Task],
    *,
    run: str | Path | None = None,
    split: str | None = None,
    settings: SolveSettings | None = None,
    workers: int | None = None,
    limit: int | None = None,
    max_minutes: float | None = None,
    out: str | Path | None = None,
    weights: str = "last",
    device: str = "auto",
    quiet: bool = False,
) -> Solution:
    """Answer ARC tasks by training a copy of the planner on each task's own demonstrations.

    Nothing of a test pair but its input is looked at before its answer has been handed in. SIGINT, SIGTERM and SIGHUP
    end it with what is there, and raise `Interrupted`; with `out`, the same call goes on from there and ends with the
    same submission.

    Args:
        tasks: arc1, arc2, a folder of tasks, a task file, a Kaggle challenges file; or tasks.
        run: run folder whose weights each task starts from; None starts from random weights.
        split: part of the tasks, as `load_tasks` takes it: by default evaluation, or the only part there is.
        settings: what is done for a task; by default `SolveSettings()`.
        workers: processes with a thread each, on the CPU; by default one per core, or none where `device` is CUDA and
            tasks are trained on side by side there.
        limit: the first so many tasks by id.
        max_minutes: for all tasks; the ones that are not reached get their query for an answer.
        out: folder for submission.json, results.jsonl, score.json, solve.log and solve.html, new or of the same solve;
            None writes nothing.
        weights: of a run, "last" or "best".
        device: where Qwen reads, and where tasks are trained on if no workers are asked for: auto, cpu, cuda or cuda:N.
        quiet: say nothing on the terminal.

    Returns:
        The attempts, and the scores where answers are known.

    Raises:
        ValueError: an argument, the run or the tasks cannot be used, or `out` holds another solve.
        SolveStopped: a file could not be written, or workers could not start.
    """
    settings = settings or SolveSettings()
    for name, value in (("limit", limit), ("workers", workers), ("max_minutes", max_minutes)):
        require(value is None or value > 0, name, "a number above 0", value)
    collection = read_tasks(tasks, split, limit)
    planner, described = open_planner(run, weights, settings, device)
    folder = None if out is None else Path(out)
    with reserved(folder, planner, settings) as held, open_log(folder, quiet) as log, catch_signals() as signalled:
        for sentence in collection.skipped:
            log.say(f"Left out: {sentence}")
        log.say(described)
        log.say(describe_tasks(tasks, split, collection, settings))
        text = planner.prompt.prompt_text
        cut = describe_cut({"": text.truncation(task.train for task in collection.tasks)}, text.max_tokens)
        if cut:
            log.say(cut)
        try:
            solution = solve_tasks(
                planner,
                collection.tasks,
                settings,
                workers=workers,
                max_seconds=60 * max_minutes if max_minutes else None,
                folder=held,
                unusable=collection.unusable,
                log=log,
                should_stop=signalled,
            )
            if held:
                log.say("")
                solution.write_score(held.path / "score.json")
                lead = (described, describe_tasks(tasks, split, collection, settings))
                write_page(held.path / "solve.html", solution, lead=lead)
            tell(solution, log)
        except OSError as error:
            where, rest = error.filename or folder, f"; what is done is in {folder / RESULTS}" if folder else ""
            raise SolveStopped(
                f"{where}: {error.strerror or error}{rest}. When there is room, and leave to write, the same command "
                "goes on from there"
            ) from error
        except RuntimeError as error:
            raise SolveStopped(str(error)) from error
        if number := signalled():
            log.say("Interrupted: " + ("the same command goes on from there." if folder else "nothing was written."))
            raise Interrupted(number)
    return solution


def read_tasks(tasks: str | Path | Sequence[Task], split: str | None, limit: int | None) -> TaskCollection:
    """The tasks to solve, the first `limit` of them; one pair is enough to train on."""
    if isinstance(tasks, (str, Path)):
        collection = load_tasks(str(tasks), split, min_pairs=1)
    else:
        require(split is None, "split", "None where tasks are given as such", split)
        twice = [task_id for task_id, count in Counter(task.id for task in tasks).items() if count > 1]
        require(not twice, "tasks", "tasks with different ids", twice)
        require(len(tasks) > 0, "tasks", "at least one task", list(tasks))
        collection = TaskCollection(tuple(sorted(tasks, key=lambda task: task.id)))
    if limit is None:
        return collection
    chosen = set(sorted(task.id for task in (*collection.tasks, *collection.unusable))[:limit])
    kept = (tuple(t for t in part if t.id in chosen) for part in (collection.tasks, collection.unusable))
    return TaskCollection(next(kept), collection.skipped, next(kept))


def open_planner(run: str | Path | None, weights: str, settings: SolveSettings, device: str) -> tuple[QwenPlanner, str]:
    """A run's planner, or one with random weights; and a sentence that says which."""
    if run is not None:
        planner = load_model(Path(run), weights, resolve_device(device))
        with error_prefix(f"run {run}"):
            lines_agent(planner)
        # without a step it answers as the run itself does
        planner, tasks = with_start(planner, Path(run)) if settings.steps else (planner, 0)
        learned = f", and the start it learned from {tasks} trainings on tasks" if tasks else ""
        return planner, f"From the {weights} weights of run {run}{learned}."
    with seeded(settings.seed):
        planner = QwenPlanner(TrainConfig(seed=settings.seed))
    told = f"Without a run: from random weights (seed {settings.seed}), so all is learned from the task itself."
    return planner.to(resolve_device(device)), told


@contextmanager
def reserved(folder: Path | None, planner: QwenPlanner, settings: SolveSettings) -> Iterator[SolveFolder | None]:
    """The folder of this solve, or None."""
    if folder is None:
        yield None
        return
    with solve_folder(folder, {"weights": fingerprint(planner), **asdict(settings)}) as held:
        yield held


@contextmanager
def open_log(folder: Path | None, quiet: bool) -> Iterator[SolveLog]:
    log = SolveLog(folder, quiet=quiet)
    try:
        yield log
    finally:
        log.close()


def fingerprint(planner: QwenPlanner) -> str:
    """SHA-256 of every weight that an answer depends on."""
    found = hashlib.sha256()
    for part in (planner.agent, planner.prompt):
        for name, tensor in part.state_dict().items():
            found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def describe_tasks(
    tasks: str | Path | Sequence[Task], split: str | None, collection: TaskCollection, settings: SolveSettings
) -> str:
    """What is about to be solved, and how long each task may take."""
    source = f" of {tasks}{f' ({split})' if split else ''}" if isinstance(tasks, (str, Path)) else ""
    seconds = f" and {settings.task_seconds:g} s" if settings.task_seconds else ""
    return f"{len(collection.tasks)} tasks{source}, at most {settings.steps} steps{seconds} of training each."


def tell(solution: Solution, log: SolveLog) -> None:
    """The result: a line per size of grid, the score, and where the files are."""
    evaluation, sizes = solution.evaluation, solution.by_size()
    for row in sizes:
        score = f"{row['solved']} of {row['scored']} solved" if row["scored"] else "not scored"
        seconds = f", {row['seconds']:.1f} s a task" if row["seconds"] is not None else ""
        log.say(f"Sides {row['sides'][0]:2d} to {row['sides'][1]}: {row['tasks']} tasks, {score}{seconds}")
    if evaluation.scored:
        log.say(
            f"Solved {sum(row['solved'] for row in sizes)} of {sum(row['scored'] for row in sizes)} tasks; of "
            f"{evaluation.scored} test inputs pass@1 {evaluation.pass_at_1:.4f}, pass@2 {evaluation.pass_at_2:.4f}, "
            f"cells {evaluation.cell_accuracy:.4f} (copying the input {evaluation.copy_cell_accuracy:.4f})."
        )
    else:
        log.say("Not scored: no answer is known.")
    if solution.unanswered:
        log.say(f"{len(solution.unanswered)} tasks have their query for an answer: {', '.join(solution.unanswered)}.")
    if solution.folder:
        log.say(f"Submission: {solution.folder / SUBMISSION}\nPage: {solution.folder / 'solve.html'}")


def new_solve_folder(parent: Path) -> Path:
    """parent/YYYYMMDD-HHMMSS, numbered where the second is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{number}" for number in range(1, 1000))]
    return next(parent / name for name in names if not (parent / name).exists())
