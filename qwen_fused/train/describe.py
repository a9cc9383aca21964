"""What a run says of itself before its first batch."""

from __future__ import annotations

import json
from dataclasses import asdict

from qwen_fused.arc.episodes import leave_one_out, test_episodes
from qwen_fused.arc.split import spread
from qwen_fused.common.files import write_atomic
from qwen_fused.qwen.prompt_text import Truncation, describe_cut
from qwen_fused.report.run_files import PROMPTS
from qwen_fused.report.run_log import RunLog
from qwen_fused.train.resume import Continuation
from qwen_fused.train.trainer import Trainer

# of more tasks than these, some are counted: 10,000 would take nine seconds
TASKS_COUNTED = 500


def describe_run(trainer: Trainer, log: RunLog, run: Continuation | None) -> None:
    """Say what is about to run: data, sizes, device, and what was found of the run to continue."""
    for sentence in trainer.skipped[:10]:
        log.say(f"Left out: {sentence}")
    if len(trainer.skipped) > 10:
        log.say(f"Left out: {len(trainer.skipped) - 10} more.")
    for sentence in trainer.notes:
        log.say(sentence)
    sizes = ", ".join(f"{name} {sum(p.numel() for _, p in ps):,}" for name, ps in trainer.groups.items())
    log.say(
        f"Run {trainer.folder} on {trainer.device} ({trainer.config.precision}): "
        f"{len(trainer.training)} training tasks, {len(trainer.held_out)} held out, {trainer.total_batches} batches. "
        f"Trainable parameters: {sizes}."
    )
    cut = truncation(trainer)
    told = describe_cut(cut, trainer.model.prompt.prompt_text.max_tokens)
    write_atomic(trainer.folder / PROMPTS, json.dumps({"told": told, **{name: asdict(t) for name, t in cut.items()}}))
    if told:
        log.say(told)
    for note in run.notes if run else ():
        log.say(note)
    if run and run.checkpoint:
        log.say(f"Continuing from {run.checkpoint} at batch {trainer.progress.step}.")


def truncation(trainer: Trainer) -> dict[str, Truncation]:
    """What the prompts of each set lose, by its name; of a large set some tasks are counted."""
    prompt_text = trainer.model.prompt.prompt_text
    parts = {
        "training": [episode for task in spread(trainer.training, TASKS_COUNTED) for episode in leave_one_out(task)],
        "held-out": test_episodes(spread(trainer.held_out, TASKS_COUNTED)),
    }
    return {name: prompt_text.truncation(e.demonstrations for e in episodes) for name, episodes in parts.items()}
