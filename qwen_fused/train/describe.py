"""What a run says of itself before its first batch."""

from __future__ import annotations

from qwen_fused.arc.episodes import leave_one_out, test_episodes
from qwen_fused.arc.split import spread
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
    truncation = describe_truncation(trainer)
    if truncation:
        log.say(truncation)
    for note in run.notes if run else ():
        log.say(note)
    if run and run.checkpoint:
        log.say(f"Continuing from {run.checkpoint} at batch {trainer.progress.step}.")


def describe_truncation(trainer: Trainer) -> str | None:
    """How many prompts have no room for all of their demonstrations, and the flag to change; None where all have."""
    prompt_text = trainer.model.prompt.prompt_text
    parts = {
        "training": [episode for task in spread(trainer.training, TASKS_COUNTED) for episode in leave_one_out(task)],
        "held-out": test_episodes(spread(trainer.held_out, TASKS_COUNTED)),
    }
    lost = {name: prompt_text.truncation(e.demonstrations for e in episodes) for name, episodes in parts.items()}
    if not any(truncation.truncated_prompts for truncation in lost.values()):
        return None
    shares = " and ".join(f"{t.truncated_prompts} of {t.prompts} {name} prompts" for name, t in lost.items())
    return (
        f"Cut to {prompt_text.max_tokens} tokens: {shares}, without {sum(t.dropped_pairs for t in lost.values())} of "
        f"their demonstration pairs. The longest has {max(t.longest for t in lost.values())} tokens; a larger "
        "--max-prompt-tokens keeps more, for more time and memory."
    )
