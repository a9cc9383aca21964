"""Solve tasks: put each to a worker, keep what is done, and have a whole submission at any time.

    tasks ─► question (no answers; Qwen reads it here) ─► workers: train, vote ─► results.jsonl ─► submission.json
                                                        ─► on CUDA chunks of tasks, side by side ─►

A result is written before its task's answers are read. What a task gets depends on the planner, its demonstrations and
test inputs, the settings and its id: not on other tasks, on workers, or on the order. Where a time limit ends the
training, the clock decides too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from qwen_fused.arc.tasks import Task
from qwen_fused.config import require
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.solve_log import Counts, SolveLog, short_time
from qwen_fused.solver.chunks import run_chunks
from qwen_fused.solver.folder import SUBMISSION, SolveFolder
from qwen_fused.solver.question import Question, job_bytes, make_question
from qwen_fused.solver.results import TaskResult, fallback
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solution import Solution, canvas, score_task
from qwen_fused.solver.task_planner import lines_agent
from qwen_fused.solver.worker_process import usable_cores
from qwen_fused.solver.workers import COMMAND, run_workers

# seconds between submissions while tasks are being solved
SUBMIT_EVERY = 10.0


def solve_tasks(
    planner: QwenPlanner,
    tasks: Sequence[Task],
    settings: SolveSettings,
    *,
    workers: int | None = None,
    max_seconds: float | None = None,
    folder: SolveFolder | None = None,
    unusable: Sequence[Task] = (),
    log: SolveLog | None = None,
    should_stop: Callable[[], object] = lambda: None,
    on_result: Callable[[int], object] = lambda done: None,
    side_by_side: bool | None = None,
    command: Sequence[str] = COMMAND,
) -> Solution:
    """Answer tasks with a planner that is trained on each.

    Args:
        planner: what each task starts from; it stays as it is.
        tasks: with different ids.
        settings: what is done for a task.
        workers: processes; by default one per core, or none where tasks are solved side by side.
        max_seconds: for all tasks; those that are not reached get their query for an answer.
        folder: what is done there is not done again, and what is done here is written there.
        unusable: tasks that could not be read: their queries stand for their answers.
        log: where a line per task goes.
        should_stop: asked several times a second; something true leaves what is not done.
        on_result: called with the number of tasks done, after each.
        side_by_side: many tasks at once on the planner's device, instead of workers; by default where that is CUDA
            and no `workers` are asked for.
        command: what to start as a worker.

    Raises:
        ValueError: `workers` or `max_seconds` is not above 0.
        RuntimeError: workers could not start.
        OSError: the folder could not be written to.
    """
    require(workers is None or workers > 0, "workers", "a number above 0", workers)
    require(max_seconds is None or max_seconds > 0, "max_seconds", "a number above 0", max_seconds)
    if side_by_side is None:
        side_by_side = workers is None and next(planner.agent.parameters()).is_cuda
    log = log or SolveLog(quiet=True)
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    results = folder.done(tasks) if folder else {}
    counts = Counts(len(tasks), sum(map(work_of, tasks)))
    for task in tasks:
        if task.id in results:
            counts.add(work_of(task), solved(task, results[task.id]), before=True)
    by_id = {task.id: task for task in tasks}
    results |= {task.id: fallback(task, "it could not be read") for task in unusable}
    solution = Solution((*tasks, *unusable), results, folder.path if folder else None)
    submission = Submission(solution)
    # the small ones first: most is solved where the time is short
    left = sorted((task for task in tasks if task.id not in results), key=lambda task: (work_of(task), task.id))
    if counts.done:
        log.say(f"Going on: {counts.describe()} already.")
    with log.progress(counts) as advance:
        submission.write()
        questions = make_questions(planner, left, settings)

        def on_step(chunk: Sequence[Task], step: int) -> None:
            advance(sum(map(work_of, chunk)) * step / settings.steps)

        if side_by_side:
            rows = run_chunks(
                lines_agent(planner), questions, settings, deadline=deadline, should_stop=should_stop, on_step=on_step
            )
        else:
            rows = run_workers(
                job_bytes(planner, settings), questions, min(workers or usable_cores(), len(left)),
                deadline=deadline, should_stop=should_stop, command=command,
            )  # fmt: skip
        for result in rows:
            task = by_id[result.answer.task_id]
            if folder:
                folder.add(result)
            results[task.id] = result
            submission.write(every=SUBMIT_EVERY)
            # written and handed in: now its answers may be read
            counts.add(work_of(task), solved(task, result), failed=bool(result.failed))
            log.say(describe_result(task, result, counts))
            advance()
            on_result(counts.done)
        submission.write()
    return solution


def make_questions(
    planner: QwenPlanner, tasks: Sequence[Task], settings: SolveSettings
) -> Iterator[Question | TaskResult]:
    """A question for each task; a task that Qwen cannot read costs itself alone."""
    for task in tasks:
        try:
            yield make_question(planner, task, settings)
        except Exception as error:
            yield fallback(task, f"{type(error).__name__}: {error}".split("\n")[0])


class Submission:
    """submission.json of a solve that is under way, whole from its first moment on."""

    def __init__(self, solution: Solution):
        self.solution = solution
        self.path = solution.folder / SUBMISSION if solution.folder else None
        self.written = -1e9

    def write(self, *, every: float = 0.0) -> None:
        """Write it, if it was last written so many seconds ago."""
        if self.path is not None and time.monotonic() - self.written >= every:
            self.solution.write_submission(self.path)
            self.written = time.monotonic()


def work_of(task: Task) -> int:
    """Cells of the canvas, with what every task costs besides."""
    rows, columns = canvas(task)
    return rows * columns + 30


def solved(task: Task, result: TaskResult) -> bool | None:
    """Every test input is right; None where an answer is not known."""
    scores = [record.score for record in score_task(task, result)]
    return None if None in scores else all(score.any for score in scores if score is not None)


def describe_result(task: Task, result: TaskResult, counts: Counts) -> str:
    """One line: `[ 12/400] 0d3d703e solved, sure 0.93, 150 steps in 4.1 s, ...`."""
    answer, right = result.answer, solved(task, result)
    number = f"[{counts.done:{len(str(counts.tasks))}d}/{counts.tasks}] {task.id}"
    if result.failed:
        line = f"{number} FAILED, its query is its answer: {result.failed}"
    else:
        verdict = {True: "solved", False: "not solved", None: "answered"}[right]
        loss = f", loss {answer.losses[0]:.3f} to {answer.losses[-1]:.3f}" if answer.losses else ""
        line = (
            f"{number} {verdict}, sure {result.confidence:.2f}, {answer.steps} steps in {answer.seconds:.1f} s{loss}, "
            f"own pairs right {100 * answer.own_solved:.0f} %" + (", cut short" if result.cut else "")
        )
    left = counts.seconds_left()
    return f"{line} | {counts.describe()}" + (f", {short_time(left)} left" if left else "")
