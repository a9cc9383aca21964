"""The page of a solve, from its solution: this is where answers are laid beside attempts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_fused.arc.tasks import Task
from qwen_fused.report.solve_page import ShownTask, ShownTest, write_solve_page
from qwen_fused.solver.results import TaskResult
from qwen_fused.solver.solution import Solution


def write_page(path: Path, solution: Solution, *, title: str = "", lead: Sequence[str] = ()) -> None:
    """Write a solution as a page.

    Args:
        path: HTML file.
        solution: what came of the tasks.
        title: heading; by default the folder's name.
        lead: sentences under it.
    """
    write_solve_page(
        path,
        title=title or (solution.folder.resolve().name if solution.folder else path.stem),
        lead=lead,
        tiles=tiles(solution),
        sizes=solution.by_size(),
        tasks=[shown(task, solution.result(task)) for task in solution.tasks],
    )


def shown(task: Task, result: TaskResult) -> ShownTask:
    """A task as the page shows it."""
    answer = result.answer
    return ShownTask(
        task_id=task.id,
        demonstrations=tuple((pair.input, pair.output) for pair in task.train),  # type: ignore[misc]
        tests=tuple(
            ShownTest(pair.input, grids, pair.output, confidence)
            for pair, grids, confidence in zip(task.test, answer.attempts, answer.confidence, strict=True)
        ),
        confidence=result.confidence,
        losses=answer.losses,
        seconds=answer.seconds,
        steps=answer.steps,
        own_solved=answer.own_solved,
        failed=result.failed,
        cut=result.cut,
    )


def tiles(solution: Solution) -> list[dict[str, str]]:
    """The headline: label, figure, and what to hold it against."""
    evaluation, sizes = solution.evaluation, solution.by_size()
    scored, solved = (sum(row[key] for row in sizes) for key in ("scored", "solved"))
    if scored:
        inputs = f"test inputs right: {round(evaluation.pass_at_2 * evaluation.scored)} of {evaluation.scored}"
        found = [
            {"label": "Tasks solved, two attempts", "figure": f"{solved} of {scored}", "note": inputs},
            {
                "label": "First attempt right",
                "figure": f"{100 * evaluation.pass_at_1:.1f} %",
                "note": f"copying the input: {100 * evaluation.copy_solved:.1f} %",
            },
            {
                "label": "Cells right",
                "figure": f"{100 * evaluation.cell_accuracy:.1f} %",
                "note": f"copying the input: {100 * evaluation.copy_cell_accuracy:.1f} %",
            },
        ]
    else:
        found = [{"label": "Tasks solved", "figure": "not scored", "note": "no answer is known"}]
    answered = len(solution.tasks) - len(solution.unanswered)
    waiting = "every task has an answer" if not solution.unanswered else "the others have their query for an answer"
    found.append({"label": "Answered", "figure": f"{answered} of {len(solution.tasks)}", "note": waiting})
    if answered:
        found.append({"label": "Seconds a task", "figure": f"{solution.seconds:.1f} s", "note": "training, one core"})
    return found
