"""The run: one loop from ARC batches to Qwen's weights, with its log, checkpoints, evaluation and report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_fused.checkpoint import find_checkpoint, read_state, write_state
from qwen_fused.config import TrainConfig
from qwen_fused.data import test_episodes
from qwen_fused.evaluate import Evaluation, evaluate, write_submission
from qwen_fused.examples import write_examples
from qwen_fused.memory import check_memory
from qwen_fused.prove_trainer import prove_trainer
from qwen_fused.report import write_report
from qwen_fused.runlog import RunLog, log_line
from qwen_fused.trackers import tracker_names
from qwen_fused.trainer import PendingBatch, Trainer, TrainingStopped, resolve_device
from qwen_fused.watched import chosen_examples, watched_episodes, watched_examples

TRAINING_TASKS_SHOWN = 100


def train(config: TrainConfig) -> Path:
    """Train, evaluate and report; returns the run folder.

    Raises:
        ValueError: the configuration or the data cannot be used.
        TrainingStopped: a gradient is NaN or Inf and the configuration says stop, the proof failed, or memory ran out.
        KeyboardInterrupt: SIGINT, after a checkpoint was written.
    """
    trackers = tracker_names(config.trackers)
    checkpoint = find_checkpoint(config.resume) if config.resume else None
    folder = checkpoint.parent.parent if checkpoint else new_run_folder(config.out)
    try:
        memory = check_memory(config, resolve_device(config.device))
        trainer = Trainer(config, folder)
    except ValueError:
        if not checkpoint:
            # a run that could not begin leaves nothing behind
            folder.rmdir()
        raise
    if checkpoint:
        trainer.load_state_dict(read_state(checkpoint))
    else:
        config.save(folder / "config.yaml")
    resume_step = trainer.progress.step if checkpoint else None
    log = RunLog(folder, resume_step=resume_step, trackers=trackers, config=config.to_dict())
    try:
        describe_run(trainer, log, checkpoint)
        log.say(memory)
        prove_first(trainer, log)
        run_batches(trainer, log)
        finish(trainer, log)
    except (RuntimeError, MemoryError) as error:
        hint = trainer.monitor.explain(error)
        if hint is None:
            raise
        raise TrainingStopped(str(hint)) from error
    finally:
        log.close()
    return folder


def prove_first(trainer: Trainer, log: RunLog) -> None:
    """Prove the gradient before the first batch is spent on a loop that cannot learn.

    Raises:
        TrainingStopped: the proof failed; the ladder is in the log and in proof.json.
    """
    if not trainer.config.prove or trainer.progress.step:
        return
    report = prove_trainer(trainer)
    (trainer.folder / "proof.json").write_text(json.dumps(report.to_dict(), indent=2))
    log.say(str(report).rstrip())
    if not report.ok:
        raise TrainingStopped("the gradient does not reach what should train; --no-prove trains all the same")


def run_batches(trainer: Trainer, log: RunLog) -> None:
    """The loop. A batch is logged when the next one is under way, so that logging never holds the device up."""
    config, progress = trainer.config, trainer.progress
    per_epoch = trainer.sampler.batches_per_epoch()
    last = min(trainer.total_batches, config.max_batches or trainer.total_batches)
    clock = Clock(config.max_minutes)
    pending: PendingBatch | None = None
    if progress.step == 0:
        watched = watched_episodes(trainer.held_out)
        log.predictions(0, watched_examples(watched, evaluate(trainer.model, watched, batch_size=config.batch_size)))
        clock.pause()
    with catch_sigint() as interrupted, log.progress(last, progress.step, "training") as advance:
        while progress.step < last:
            epoch, index = divmod(progress.step, per_epoch)
            episodes = trainer.sampler.batch(epoch, index)
            running = trainer.train_step(episodes, epoch, flush=trainer.sampler.ends_window(index))
            running.seconds = clock.lap()
            log_batch(trainer, log, pending)
            pending = running
            advance(progress.step)
            epoch_ends = config.eval_every and progress.step % (per_epoch * config.eval_every) == 0
            saves = progress.step % config.checkpoint_every == 0
            if epoch_ends or saves or interrupted() or clock.is_over():
                pending = log_batch(trainer, log, pending)
            if epoch_ends and progress.step < last:
                validate(trainer, log)
                clock.pause()
            if saves:
                trainer.save()
            if interrupted():
                path = trainer.save()
                log.say(f"Interrupted after batch {progress.step}; to go on: qwen-fused train --resume {path}")
                raise KeyboardInterrupt
            if clock.is_over():
                log.say(f"Stopping after {config.max_minutes:g} minutes, at batch {progress.step} of {last}.")
                break
        log_batch(trainer, log, pending)
    trainer.save()


def log_batch(trainer: Trainer, log: RunLog, pending: PendingBatch | None) -> None:
    """Write the metrics of a batch that is done.

    Raises:
        TrainingStopped: its gradient was NaN or Inf; a checkpoint without it is written first.
    """
    if pending is None:
        return
    try:
        metrics = trainer.read(pending)
    except TrainingStopped:
        log.say(f"Checkpoint: {trainer.save()}")
        raise
    metrics["episodes_per_second"] = pending.episodes / pending.seconds
    log.row(metrics)
    if pending.flushed:
        log.gradients(pending.step, trainer.layer_norms)
    for hint in trainer.hints:
        log.say(str(hint))
    if pending.step == 1 or pending.step % trainer.config.log_every == 0:
        log.say(log_line(metrics))


class Clock:
    """Seconds between batches, and whether the run's minutes are over."""

    def __init__(self, max_minutes: float | None):
        self.started = self.last = time.monotonic()
        self.limit = 60 * max_minutes if max_minutes else float("inf")

    def lap(self) -> float:
        """Seconds since the last lap or pause."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return max(seconds, 1e-9)

    def pause(self) -> None:
        """Leave out the time since the last lap."""
        self.last = time.monotonic()

    def is_over(self) -> bool:
        """Whether the run has had its minutes."""
        return time.monotonic() - self.started > self.limit


def validate(trainer: Trainer, log: RunLog) -> Evaluation:
    """Evaluate on the held-out tasks, and keep the weights when cell accuracy is the best so far."""
    result = evaluate(trainer.model, test_episodes(trainer.held_out), batch_size=trainer.config.batch_size)
    log.say(f"Validation after batch {trainer.progress.step}: {describe_evaluation(result)}")
    log.predictions(trainer.progress.step, watched_examples(watched_episodes(trainer.held_out), result))
    if result.cell_accuracy > trainer.progress.best_accuracy:
        trainer.progress.best_accuracy = result.cell_accuracy
        (trainer.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_state(trainer.folder / "checkpoints" / "best.safetensors", {"model": trainer.model.state_dict()})
    return result


def finish(trainer: Trainer, log: RunLog) -> None:
    """Evaluate, write submission, examples and report, and say where they are."""
    folder, model, batch_size = trainer.folder, trainer.model, trainer.config.batch_size
    validation = validate(trainer, log)
    # every k-th task: what training tasks' unseen pairs show, they show in a hundred
    some = trainer.training[:: -(-len(trainer.training) // TRAINING_TASKS_SHOWN)]
    training = evaluate(model, test_episodes(some), batch_size=batch_size)
    log.say(f"Unseen test pairs of {len(some)} training tasks: {describe_evaluation(training)}")
    evaluation = {"validation": validation.to_dict(), "training": training.to_dict()}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_submission(folder / "submission.json", trainer.held_out, validation.predictions)
    write_examples(folder / "examples.json", chosen_examples(model, trainer.held_out, validation))
    log.say(f"Report: {write_report(folder)}")


def describe_run(trainer: Trainer, log: RunLog, checkpoint: Path | None) -> None:
    """Say what is about to run: data, sizes, device."""
    for sentence in trainer.skipped[:10]:
        log.say(f"Left out: {sentence}")
    if len(trainer.skipped) > 10:
        log.say(f"Left out: {len(trainer.skipped) - 10} more.")
    sizes = ", ".join(f"{name} {sum(p.numel() for _, p in ps):,}" for name, ps in trainer.groups.items())
    log.say(
        f"Run {trainer.folder} on {trainer.device} ({trainer.config.precision}): "
        f"{len(trainer.training)} training tasks, {len(trainer.held_out)} held out, {trainer.total_batches} batches. "
        f"Trainable parameters: {sizes}."
    )
    if checkpoint:
        log.say(f"Continuing from {checkpoint} at batch {trainer.progress.step}.")


def describe_evaluation(result: Evaluation) -> str:
    """One line of an evaluation's figures, the copy-the-input baseline beside them."""
    return (
        f"{len(result.records)} test inputs, pass@1 {result.pass_at_1:.4f}, pass@2 {result.pass_at_2:.4f}, "
        f"cells {result.cell_accuracy:.4f} (copying the input {result.copy_cell_accuracy:.4f}), "
        f"sizes {result.size_accuracy:.4f}, tasks solved: {', '.join(result.solved_tasks) or 'none'}"
    )


def new_run_folder(out: Path) -> Path:
    """A new folder out/YYYYMMDD-HHMMSS, numbered when the second is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = out / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"out must be a folder that can be written to, got {out}: {error.strerror}") from None
    raise ValueError(f"out has 1000 runs of this second already: {out}")


@contextmanager
def catch_sigint() -> Iterator[Any]:
    """Turn the first SIGINT into a flag to be asked between batches; a second one acts at once."""
    seen = False

    def handler(number: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:
        # not the main thread: the caller keeps its own handling
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
