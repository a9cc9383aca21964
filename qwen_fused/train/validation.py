"""What a run's weights answer: on the held-out tasks while it trains, and at its end in full, with a report."""

from __future__ import annotations

import json

from qwen_fused.arc.episodes import test_episodes
from qwen_fused.arc.scoring import Evaluation, write_submission
from qwen_fused.common.files import write_atomic
from qwen_fused.report.answers import write_examples
from qwen_fused.report.page import write_report
from qwen_fused.report.pick_examples import final_examples, watched_episodes, watched_examples
from qwen_fused.report.run_log import RunLog
from qwen_fused.solver.evaluate import evaluate
from qwen_fused.train.adapted import evaluate_adapted
from qwen_fused.train.checkpoint import write_state
from qwen_fused.train.trainer import Trainer

TRAINING_TASKS_EVALUATED = 100


def predict_watched(trainer: Trainer, log: RunLog) -> None:
    """Keep what the watched episodes are answered now, alone, as `validate` keeps it beside all others."""
    watched = watched_episodes(trainer.held_out)
    result = evaluate(trainer.model, watched, batch_size=trainer.config.batch_size)
    log.predictions(trainer.progress.step, watched_examples(watched, result))


def validate(trainer: Trainer, log: RunLog) -> Evaluation:
    """Evaluate on the held-out tasks, and keep the weights when cell accuracy is the best so far."""
    result = evaluate(trainer.model, test_episodes(trainer.held_out), batch_size=trainer.config.batch_size)
    log.say(f"Validation after batch {trainer.progress.step}: {result.describe()}")
    log.predictions(trainer.progress.step, watched_examples(watched_episodes(trainer.held_out), result))
    if result.cell_accuracy > trainer.progress.best_accuracy:
        trainer.progress.best_accuracy = result.cell_accuracy
        weights = trainer.weights()
        (trainer.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if trainer.ranks.is_main:
            write_state(trainer.folder / "checkpoints" / "best.safetensors", {"model": weights})
    return result


def finish(trainer: Trainer, log: RunLog) -> None:
    """Evaluate, write submission, examples and report, and say where they are."""
    folder, model, batch_size = trainer.folder, trainer.model, trainer.config.batch_size
    validation = validate(trainer, log)
    # every k-th task: what training tasks' unseen pairs show, they show in a hundred
    some = trainer.training[:: -(-len(trainer.training) // TRAINING_TASKS_EVALUATED)]
    training = evaluate(model, test_episodes(some), batch_size=batch_size)
    log.say(f"Unseen test pairs of {len(some)} training tasks: {training.describe()}")
    shown = final_examples(model, trainer.held_out, validation)
    if not trainer.ranks.is_main:
        return
    evaluation = {"validation": validation.to_dict(), "training": training.to_dict()}
    write_atomic(folder / "evaluation.json", json.dumps(evaluation))
    write_submission(folder / "submission.json", trainer.held_out, validation.predictions)
    write_examples(folder / "examples.json", shown)
    if adapted := evaluate_adapted(trainer, validation, log):
        # after what was there already: whatever ends this, the run has its evaluation
        write_atomic(folder / "evaluation.json", json.dumps({**evaluation, "validation, adapted": adapted}))
    log.say(f"Report: {write_report(folder)}")
