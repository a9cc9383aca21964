"""The run: one loop from ARC batches to Qwen's weights, with its log, checkpoints, evaluation and report."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qwen_fused.common.device import resolve_device
from qwen_fused.common.files import lock_folder, write_atomic
from qwen_fused.config import TrainConfig
from qwen_fused.parallel.processes import Ranks, process_group
from qwen_fused.qwen.memory import check_memory
from qwen_fused.report.run_log import RunLog
from qwen_fused.report.trackers import tracker_names
from qwen_fused.train.checkpoint import list_checkpoints
from qwen_fused.train.clock import Clock
from qwen_fused.train.describe import describe_run
from qwen_fused.train.located import located
from qwen_fused.train.monitor import out_of_memory
from qwen_fused.train.pending import PendingBatch
from qwen_fused.train.prove_trainer import prove_trainer
from qwen_fused.train.resume import Continuation, compare_fingerprint, explain_mismatch, open_run, set_later_aside
from qwen_fused.train.signals import Interrupted, catch_signals
from qwen_fused.train.trainer import Trainer, TrainingStopped
from qwen_fused.train.validation import finish, predict_watched, validate


def train(config: TrainConfig) -> Path:
    """Train, evaluate and report; returns the run folder. Under torchrun every process calls it, the first one writes.

    Raises:
        ValueError: the configuration or the data cannot be used.
        TrainingStopped: a gradient is NaN or Inf and the configuration says stop, the proof failed, memory ran out, or
            a file could not be written.
        Interrupted: SIGINT, SIGTERM or SIGHUP, after a checkpoint was written.
    """
    trackers, config = tracker_names(config.trackers), located(config)
    with process_group() as ranks, ranks.silenced() as scratch:
        run = open_run(config) if config.resume else None
        folder = scratch or (run.folder if run else new_run_folder(config.out))
        run_in(folder, config, run, ranks, trackers if ranks.is_main else ())
    return folder


def run_in(folder: Path, config: TrainConfig, run: Continuation | None, ranks: Ranks, trackers: Sequence[str]) -> None:
    """The run from set-up to report, in its folder."""
    with lock_folder(folder):
        trainer, memory = set_up(config, folder, run, ranks)
        resume_step = run.step if run else None
        log = RunLog(folder, resume_step=resume_step, trackers=trackers, config=config.to_dict())
        try:
            describe_run(trainer, log, run)
            log.say(memory)
            prove_first(trainer, log)
            run_batches(trainer, log)
            finish(trainer, log)
        except (RuntimeError, MemoryError, OSError) as error:
            reason = explain_stop(error, trainer)
            if reason is None:
                raise
            with suppress(OSError):
                log.say(reason)
            raise TrainingStopped(reason) from error
        finally:
            log.close()


def set_up(config: TrainConfig, folder: Path, run: Continuation | None, ranks: Ranks) -> tuple[Trainer, str]:
    """The trainer at the batch to begin with, and what its memory will be; writes config.yaml."""
    try:
        memory = check_memory(config, resolve_device(ranks.device(config.device)))
        trainer = Trainer(config, folder, ranks)
        if run:
            compare_fingerprint(run, trainer.fingerprint, allow=config.resume_changed)
        if run and run.state and run.checkpoint:
            with explain_mismatch(run.checkpoint):
                trainer.load_state_dict(run.state)
    except BaseException:
        # a run that never was leaves no folder
        with suppress(OSError):
            folder.rmdir()
        raise
    # nothing is put aside before every process has read what it goes on with
    ranks.all_reduce_max(0)
    if run and ranks.is_main:
        set_later_aside(run)
    replace(config, resume=None, resume_changed=False).save(folder / "config.yaml")
    return trainer, memory


def explain_stop(error: Exception, trainer: Trainer) -> str | None:
    """What ended the run and what to do, in a sentence, where it is the machine's doing: memory, or a file."""
    if not isinstance(error, OSError):
        hint = out_of_memory(error)
        return str(hint) if hint else None
    saved = list_checkpoints(trainer.folder / "checkpoints")
    last = f"{saved[-1].name} is the last checkpoint" if saved else "there is no checkpoint yet"
    return (
        f"batch {trainer.progress.step}: {error.filename or trainer.folder}: {error.strerror or error}; {last}. When "
        f"there is room, and leave to write, go on with qwen-fused train --resume {trainer.folder}"
    )


def prove_first(trainer: Trainer, log: RunLog) -> None:
    """Prove the gradient before the first batch is spent on a loop that cannot learn.

    Raises:
        TrainingStopped: the proof failed; the ladder is in the log and in proof.json.
    """
    if not trainer.config.prove or trainer.progress.step:
        return
    if trainer.sharded:
        log.say("Not proved: the proof looks at whole weights. `qwen-fused prove` with these settings looks at them.")
        return
    # each process proves its own step of the whole batch: sums over processes are no part of it
    ranks, trainer.ranks = trainer.ranks, Ranks()
    try:
        report = prove_trainer(trainer)
    finally:
        trainer.ranks = ranks
    write_atomic(trainer.folder / "proof.json", json.dumps(report.to_dict(), indent=2))
    log.say(str(report).rstrip())
    if not report.ok:
        raise TrainingStopped("the gradient does not reach what should train; --no-prove trains all the same")


def run_batches(trainer: Trainer, log: RunLog) -> None:
    """The loop. A batch is logged when the next one is under way, so that logging never holds the device up."""
    config, progress = trainer.config, trainer.progress
    per_epoch = trainer.sampler.batches_per_epoch()
    last = min(trainer.total_batches, config.max_batches or trainer.total_batches)
    soon = range(progress.step, min(last, progress.step + trainer.sampler.window))
    if not progress.qwen and not any(trainer.sampler.ends_window(step % per_epoch) for step in soon):
        log.say(short_of_a_window(last, config.prompt_window))
    clock = Clock(config.max_minutes)
    pending: deque[PendingBatch] = deque()
    if progress.step == 0:
        predict_watched(trainer, log)
        clock.pause()
    with catch_signals() as asked_to_end, log.progress(last, progress.step, "training") as advance:
        while progress.step < last:
            epoch, index = divmod(progress.step, per_epoch)
            episodes = trainer.sampler.batch(epoch, index)
            running = trainer.train_step(episodes, epoch, flush=trainer.sampler.ends_window(index))
            running.seconds = clock.lap()
            pending.append(running)
            log_done(trainer, log, pending, left=1)
            advance(progress.step)
            epoch_ends = config.eval_every and progress.step % (per_epoch * config.eval_every) == 0
            saves = progress.step % config.checkpoint_every == 0
            number, is_over = trainer.ranks.all_reduce_max(asked_to_end() or 0, clock.is_over())
            if epoch_ends or saves or number or is_over:
                log_done(trainer, log, pending)
            if epoch_ends and progress.step < last:
                validate(trainer, log)
                clock.pause()
            if saves or number:
                path = save(trainer, log)
            if number:
                log.say(f"Interrupted after batch {progress.step}; to go on: qwen-fused train --resume {path}")
                raise Interrupted(number)
            if is_over:
                log.say(f"Stopping after {config.max_minutes:g} minutes, at batch {progress.step} of {last}.")
                break
        log_done(trainer, log, pending)
    if not progress.qwen and progress.step < last:
        log.say(short_of_a_window(progress.step, config.prompt_window))
    save(trainer, log)


def short_of_a_window(batches: int, window: int) -> str:
    """That Qwen does not step in so few batches. It isn't made to: a longer run goes on from here, bit for bit."""
    return (
        f"Qwen does not step: the run has {batches} batches, and its prompt window {window}. A --prompt-window of at "
        f"most {batches} lets it."
    )


def save(trainer: Trainer, log: RunLog) -> Path:
    """Write a checkpoint, its rows of metrics.jsonl before it."""
    log.sync()
    return trainer.save()


def log_done(trainer: Trainer, log: RunLog, pending: deque[PendingBatch], left: int = 0) -> None:
    """Write the metrics of batches that are done, oldest first, until `left` of them are pending.

    Raises:
        TrainingStopped: a gradient was NaN or Inf; every row and a checkpoint without that batch are written first.
    """
    while len(pending) > left:
        try:
            log_batch(trainer, log, pending.popleft())
        except TrainingStopped:
            # those behind it have been applied
            while pending:
                with suppress(TrainingStopped):
                    log_batch(trainer, log, pending.popleft())
            log.say(f"Checkpoint: {save(trainer, log)}")
            raise


def log_batch(trainer: Trainer, log: RunLog, pending: PendingBatch) -> None:
    """Write the metrics of one batch, then raise TrainingStopped if it is one to stop at."""
    stopped = None
    try:
        metrics = trainer.read(pending)
    except TrainingStopped as error:
        if error.metrics is None:
            raise
        stopped, metrics = error, error.metrics
    metrics["episodes_per_second"] = pending.episodes / pending.seconds
    log.metrics(metrics)
    if pending.flushed:
        log.gradients(pending.step, trainer.layer_norms)
    for hint in trainer.hints:
        log.say(str(hint))
    if pending.step == 1 or pending.step % trainer.config.log_every == 0:
        log.say_trend()
    if stopped:
        raise stopped


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
