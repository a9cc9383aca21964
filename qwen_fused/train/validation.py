"""What a run's weights answer: on the held-out tasks while it trains, and at its end in full, with a report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_fused.arc.episodes import Episode, Task, test_episodes
from qwen_fused.arc.scoring import Evaluation, copied, write_submission
from qwen_fused.arc.split import spread
from qwen_fused.common.files import write_atomic
from qwen_fused.report.answers import write_examples
from qwen_fused.report.page import write_report
from qwen_fused.report.pick_examples import final_examples, watched_episodes, watched_examples
from qwen_fused.report.run_log import RunLog
from qwen_fused.solver.evaluate import evaluate
from qwen_fused.solver.start import with_agent
from qwen_fused.train.adapted import evaluate_adapted
from qwen_fused.train.checkpoint import write_state
from qwen_fused.train.run_start import learn_run_start
from qwen_fused.train.trainer import Trainer

# what a run of so many minutes has for its end: shares of them
END_SHARES = {"held-out": 0.4, "training": 0.2, "start": 0.75, "adapted": 0.6}


@dataclass(frozen=True)
class Answered:
    """An evaluation, and the tasks that it is of."""

    tasks: Sequence[Task]
    result: Evaluation


def watched_of(trainer: Trainer) -> list[Episode]:
    """The episodes that are looked at again and again, among those that every evaluation asks."""
    return watched_episodes(spread(trainer.held_out, trainer.config.max_eval_tasks))


def predict_watched(trainer: Trainer, log: RunLog) -> None:
    """Keep what the watched episodes are answered now, alone, as `validate` keeps it beside all others."""
    watched = watched_of(trainer)
    if watched:
        result = evaluate(trainer.model, watched, batch_size=trainer.config.batch_size)
        log.predictions(trainer.progress.step, watched_examples(watched, result))


def validate(trainer: Trainer, log: RunLog, seconds: float | None = None) -> Answered:
    """Evaluate on the held-out tasks, and keep the weights when cell accuracy is the best so far.

    Args:
        trainer: between two batches.
        log: gets a line.
        seconds: about how long it may take: so many tasks are asked, judged by the watched ones.
    """
    wanted = tasks = spread(trainer.held_out, trainer.config.max_eval_tasks)
    watched = watched_of(trainer)
    if not wanted:
        return Answered((), Evaluation(()))
    if seconds is not None:
        started = time.monotonic()
        predict_watched(trainer, log)
        spent = time.monotonic() - started
        tasks = spread(wanted, affordable(seconds - spent, len(watched), spent))
    result = ask(trainer, log, tasks, "held-out tasks")
    left_out = f" ({len(tasks)} of {len(trainer.held_out)} held-out tasks)" * (len(tasks) < len(trainer.held_out))
    log.say(f"Validation after batch {trainer.progress.step}{left_out}: {result.describe()}")
    if seconds is None:
        log.predictions(trainer.progress.step, watched_examples(watched, result))
    # figures of fewer tasks are not to be held against those of all
    comparable = len(tasks) == len(wanted) or trainer.progress.best_accuracy < 0
    if comparable and result.cell_accuracy > trainer.progress.best_accuracy:
        trainer.progress.best_accuracy = result.cell_accuracy
        weights = trainer.weights()
        (trainer.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if trainer.ranks.is_main:
            write_state(trainer.folder / "checkpoints" / "best.safetensors", {"model": weights})
    return Answered(tasks, result)


def affordable(seconds: float, asked: int, spent: float) -> int:
    """How many tasks can be asked in so many seconds, where `asked` took `spent`; at least one."""
    return max(1, int(seconds * asked / max(spent, 1e-9)))


def ask(trainer: Trainer, log: RunLog, tasks: Sequence[Task], what: str) -> Evaluation:
    """Evaluate, with a bar where there is a terminal."""
    episodes = test_episodes(tasks)
    with log.progress(len(episodes), 0, what) as advance:
        return evaluate(trainer.model, episodes, batch_size=trainer.config.batch_size, on_done=advance)


def finish(trainer: Trainer, log: RunLog) -> None:
    """Evaluate, write submission, examples and report, and say where they are."""
    folder, config = trainer.folder, trainer.config
    # every process asks the same tasks, as the first one's clock has it
    minutes = config.max_minutes if trainer.ranks.world_size == 1 else None
    seconds = {name: 60 * minutes * share if minutes else None for name, share in END_SHARES.items()}
    if config.start_minutes:
        seconds["start"] = 60 * config.start_minutes
    started = time.monotonic()
    held_out = validate(trainer, log, seconds["held-out"])
    some = spread(trainer.training, config.max_eval_tasks)
    if seconds["training"] is not None and held_out.tasks:
        spent = time.monotonic() - started
        some = spread(some, affordable(seconds["training"], len(held_out.tasks), spent))
    training = ask(trainer, log, some, "training tasks")
    log.say(f"Unseen test pairs of {len(some)} training tasks: {training.describe()}")
    shown_of = held_out if held_out.tasks else Answered(some, training)
    shown = final_examples(trainer.model, shown_of.tasks, shown_of.result)
    if not trainer.ranks.is_main:
        return
    evaluation = {"training": training.to_dict()}
    if held_out.tasks:
        evaluation = {"validation": held_out.result.to_dict(), **evaluation}
        write_held_out(trainer, held_out)
    else:
        log.say("No task is held out, so there is no score of tasks that the run has not trained on.")
    write_atomic(folder / "evaluation.json", json.dumps(evaluation))
    write_examples(folder / "examples.json", shown)
    start = learn_run_start(trainer, log, seconds["start"])
    planner = with_agent(trainer.model, start) if start else trainer.model
    if held_out.tasks:
        adapted = evaluate_adapted(trainer, planner, held_out.tasks, held_out.result, log, seconds["adapted"])
        if adapted:
            # after what was there already: whatever ends this, the run has its evaluation
            write_atomic(folder / "evaluation.json", json.dumps({**evaluation, "validation, adapted": adapted}))
    log.say(f"Report: {write_report(folder)}")


def write_held_out(trainer: Trainer, answered: Answered) -> None:
    """submission.json of every held-out task; those that were not asked have their query for an answer."""
    copies = Evaluation(tuple(record for task in trainer.held_out for record in copied(task)))
    predictions = {**copies.predictions, **answered.result.predictions}
    write_submission(trainer.folder / "submission.json", trainer.held_out, predictions)
