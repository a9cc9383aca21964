"""What a run's weights are worth as a start: its held-out tasks again, after training on each of them for seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_fused.arc.scoring import Evaluation
from qwen_fused.arc.split import spread
from qwen_fused.arc.tasks import Task
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.run_log import RunLog
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.solve import solve_tasks
from qwen_fused.solver.task_planner import lines_agent
from qwen_fused.solver.worker_process import usable_cores
from qwen_fused.train.signals import Interrupted, catch_signals
from qwen_fused.train.trainer import Trainer


def evaluate_adapted(
    trainer: Trainer,
    planner: QwenPlanner,
    tasks: Sequence[Task],
    before: Evaluation,
    log: RunLog,
    max_seconds: float | None = None,
) -> dict[str, Any] | None:
    """Train a copy of the planner on each held-out task for `ttt_seconds` and answer it; None where that is left out.

    Args:
        trainer: after its last batch; its weights stay as they are.
        planner: what each task starts from.
        tasks: held-out tasks.
        before: the same tasks, answered without.
        log: gets a line.
        max_seconds: for all of them; where they would take longer, fewer are trained on, spread evenly.

    Returns:
        `Evaluation.to_dict()`, and mean seconds a task.

    Raises:
        Interrupted: a signal asked the run to end.
    """
    seconds = trainer.config.ttt_seconds
    if not seconds:
        return None
    try:
        lines_agent(planner)
    except ValueError as error:
        log.say(f"Held-out tasks are not trained on: {error}.")
        return None
    if trainer.sharded:
        log.say("Held-out tasks are not trained on: Qwen is in shards here. `qwen-fused eval --ttt-steps` does that.")
        return None
    if max_seconds is not None:
        most = max(1, int(max_seconds * usable_cores() / seconds))
        tasks = spread(tasks, most)
        ids = {task.id for task in tasks}
        before = Evaluation(tuple(record for record in before.records if record.task_id in ids))
    settings = SolveSettings(task_seconds=seconds, seed=trainer.config.seed)
    with catch_signals() as signalled, log.progress(len(tasks), 0, "training on each task") as advance:
        try:
            solution = solve_tasks(
                planner, tasks, settings, should_stop=signalled, on_result=lambda done: advance(done)
            )
        except RuntimeError as error:
            # a run is whole without it
            log.say(f"Held-out tasks could not be trained on: {error}")
            return None
        if number := signalled():
            raise Interrupted(number)
    after = solution.evaluation
    log.say(
        f"Held-out tasks after {seconds:g} s of training on each: {len(after.solved_tasks)} of {len(tasks)} "
        f"solved (before {len(before.solved_tasks)}), pass@2 {after.pass_at_2:.4f} (before {before.pass_at_2:.4f}), "
        f"cells {after.cell_accuracy:.4f} (before {before.cell_accuracy:.4f}), {solution.seconds:.1f} s a task"
        + (f", {len(solution.unanswered)} without an answer" if solution.unanswered else "")
    )
    return {**after.to_dict(), "seconds_a_task": solution.to_dict()["seconds_a_task"]}
