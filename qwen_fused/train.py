"""The run: one loop from ARC batches to Qwen's weights, with its log, checkpoints, evaluation and report."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_fused.checkpoint import find_checkpoint, read_state, rng_state, save_checkpoint, set_rng_state, write_state
from qwen_fused.config import TrainConfig
from qwen_fused.data import Episode, EpisodeSampler, Task, collate, load_tasks, split_tasks, test_episodes
from qwen_fused.evaluate import Evaluation, evaluate, write_submission
from qwen_fused.gradients import GroupGradNorm, nonfinite_message
from qwen_fused.model import QwenPlanner, StepOutput
from qwen_fused.report import write_examples, write_report
from qwen_fused.runlog import RunLog, log_line

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16's scaler halves its scale at each overflow; this many in a row is no longer a matter of scale
MOST_OVERFLOWS = 25


class TrainingStopped(RuntimeError):
    """The run had to stop; the message says why and what to do."""


@dataclasses.dataclass
class Progress:
    """How far a run is; saved in every checkpoint."""

    step: int = 0
    best_accuracy: float = -1.0
    nonfinite: int = 0
    overflows: int = 0


class Trainer:
    """Model, optimizer and data of a run, built from its configuration; `run()` is the loop."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = resolve_device(config.device)
        collection = load_tasks(config.dataset)
        self.skipped = collection.skipped
        self.training, self.held_out = split_tasks(collection.tasks, config.val_fraction, config.split_seed)
        self.sampler = EpisodeSampler(
            self.training, batch_size=config.batch_size, seed=config.seed, augment=config.augment
        )
        torch.manual_seed(config.seed)
        self.model = QwenPlanner(config).to(self.device).train()
        self.groups = self.model.groups()
        self.optimizer = self._optimizer()
        self.norms = GroupGradNorm({**self.groups, "qwen": by_layer(self.groups["qwen"])})
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.progress = Progress()

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a rate per group; vectors and scalars are not decayed."""
        peak = {
            "qwen": self.config.qwen_lr,
            "agent": self.config.agent_lr,
            "policy": self.config.policy_lr,
            "objective": self.config.agent_lr / 2,
        }
        groups = []
        for name, members in self.groups.items():
            for decay in (True, False):
                chosen = [p for _, p in members if (p.ndim >= 2) == decay]
                weight_decay = self.config.weight_decay if decay else 0.0
                if chosen:
                    groups.append({"params": chosen, "name": name, "peak": peak[name], "weight_decay": weight_decay})
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    @property
    def total_batches(self) -> int:
        """Batches in all epochs; the learning-rate schedule spans them."""
        return self.config.epochs * self.sampler.batches_per_epoch()

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Linear warm-up, then linear decay; returns the rate of each group."""
        warm = min(1.0, (step + 1) / max(self.config.warmup_batches, 1))
        left = 1.0 - (1.0 - self.config.final_lr) * step / max(self.total_batches, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm * left
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def train_step(self, episodes: Sequence[Episode], epoch: int) -> dict[str, Any]:
        """One batch: forward, backward, unscale, norms, clip, step; returns what is logged.

        Raises:
            TrainingStopped: a gradient is NaN or Inf and the configuration says stop.
        """
        rates = self.set_learning_rates(self.progress.step)
        batch = collate(episodes).to(self.device)
        dtype = AUTOCAST[self.config.precision]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            out = self.model(batch, epoch=epoch)
        out.prompt.retain_grad()
        self.scaler.scale(out.loss).backward()
        # the prompt is no parameter: its gradient still has the loss scale of this batch
        prompt_grad = out.prompt.grad.float().norm() / self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        stats = self.norms.measure()
        gradients = stats.to_dict()
        bad = nonfinite_message(gradients)
        if bad is None:
            self.norms.clip_(stats, self.config.clip)
            self.progress.overflows = 0
        else:
            self._on_nonfinite(bad, out.loss)
        if bad is None or self.scaler.is_enabled():
            # the scaler skips a step whose gradients overflowed, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.model.objective.update_anchor(batch.target, out.score.efe.solved)
        self.progress.step += 1
        return self._metrics(out, gradients, prompt_grad, rates, epoch)

    def _on_nonfinite(self, bad: str, loss: Tensor) -> None:
        """Count a batch whose gradient is not finite, and stop where the configuration or a stuck scaler says so."""
        self.progress.nonfinite += 1
        self.progress.overflows += 1
        stuck = self.progress.overflows >= MOST_OVERFLOWS
        if stuck or (self.config.on_nonfinite == "stop" and not self.scaler.is_enabled()):
            raise TrainingStopped(
                f"batch {self.progress.step + 1}: {bad}; the loss was {loss.item():.4g}. Lower --qwen-lr and "
                "--agent-lr, or pass --on-nonfinite skip to count such batches and go on."
            )

    def _metrics(
        self, out: StepOutput, gradients: dict[str, dict[str, float]], prompt_grad: Tensor, rates: dict[str, float],
        epoch: int,
    ) -> dict[str, Any]:  # fmt: skip
        # one transfer for all scalars
        names = ("loss", "efe", "size_loss", "policy_loss", "reward", "prompt_grad", "mask_ratio", "accuracy", "solved")
        efe = out.score.efe
        values = torch.stack(
            [
                x.detach().float()
                for x in (
                    out.loss, efe.loss, out.score.size, out.policy.loss, out.reward.mean(), prompt_grad,
                    efe.hard_ratio.mean(), efe.accuracy.mean(), efe.solved.float().mean(), out.score.size_accuracy,
                )
            ]
        ).tolist()  # fmt: skip
        return {
            "step": self.progress.step,
            "epoch": epoch,
            **dict(zip((*names, "size_accuracy"), values, strict=True)),
            **{f"{name}_grad": gradients[name]["norm"] for name in ("qwen", "agent", "policy")},
            "nonfinite": self.progress.nonfinite,
            "lr_qwen": rates["qwen"],
            "lr_agent": rates["agent"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs; the data order follows from the step alone."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        set_rng_state(state["rng"], self.device)

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(
            self.folder / "checkpoints", self.progress.step, self.state_dict(), keep=self.config.keep_checkpoints
        )

    def validate(self, log: RunLog) -> Evaluation:
        """Evaluate on the held-out tasks, and keep the weights when cell accuracy is the best so far."""
        result = evaluate(self.model, test_episodes(self.held_out), batch_size=self.config.batch_size)
        log.say(f"Validation after batch {self.progress.step}: {describe_evaluation(result)}")
        if result.cell_accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy = result.cell_accuracy
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_state(self.folder / "checkpoints" / "best.safetensors", {"model": self.model.state_dict()})
        return result


def train(config: TrainConfig) -> Path:
    """Train, evaluate and report; returns the run folder.

    Raises:
        ValueError: the configuration or the data cannot be used.
        TrainingStopped: a gradient is NaN or Inf and the configuration says stop.
        KeyboardInterrupt: SIGINT, after a checkpoint was written.
    """
    checkpoint = find_checkpoint(config.resume) if config.resume else None
    folder = checkpoint.parent.parent if checkpoint else new_run_folder(config.out)
    trainer = Trainer(config, folder)
    if checkpoint:
        trainer.load_state_dict(read_state(checkpoint))
    else:
        config.save(folder / "config.yaml")
    log = RunLog(folder, resume_step=trainer.progress.step if checkpoint else None)
    try:
        describe_run(trainer, log, checkpoint)
        run_batches(trainer, log)
        finish(trainer, log)
    finally:
        log.close()
    return folder


def run_batches(trainer: Trainer, log: RunLog) -> None:
    """The loop."""
    config, progress = trainer.config, trainer.progress
    per_epoch = trainer.sampler.batches_per_epoch()
    last = min(trainer.total_batches, config.max_batches or trainer.total_batches)
    started = time.monotonic()
    with catch_sigint() as interrupted, log.progress(last, progress.step, "training") as advance:
        while progress.step < last:
            batch_started = time.perf_counter()
            epoch, index = divmod(progress.step, per_epoch)
            episodes = trainer.sampler.batch(epoch, index)
            metrics = trainer.train_step(episodes, epoch)
            metrics["episodes_per_second"] = len(episodes) / (time.perf_counter() - batch_started)
            log.row(metrics)
            advance(progress.step)
            if progress.step == 1 or progress.step % config.log_every == 0:
                log.say(log_line(metrics))
            if config.eval_every and progress.step % (per_epoch * config.eval_every) == 0 and progress.step < last:
                trainer.validate(log)
            if progress.step % config.checkpoint_every == 0:
                trainer.save()
            if interrupted():
                path = trainer.save()
                log.say(f"Interrupted after batch {progress.step}; continue with: qwen-fused train --resume {path}")
                raise KeyboardInterrupt
            if config.max_minutes and time.monotonic() - started > 60 * config.max_minutes:
                log.say(f"Stopping after {config.max_minutes:g} minutes, at batch {progress.step} of {last}.")
                break
    trainer.save()


def finish(trainer: Trainer, log: RunLog) -> None:
    """Evaluate, write submission, examples and report, and say where they are."""
    folder, model, batch_size = trainer.folder, trainer.model, trainer.config.batch_size
    validation = trainer.validate(log)
    training = evaluate(model, test_episodes(trainer.training), batch_size=batch_size)
    log.say(f"Test pairs of the training tasks: {describe_evaluation(training)}")
    evaluation = {"validation": validation.to_dict(), "training": training.to_dict()}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_submission(folder / "submission.json", trainer.held_out, validation.predictions)
    write_examples(folder / "examples.json", examples(model, trainer.held_out, validation))
    log.say(f"Report: {write_report(folder)}")


def examples(model: QwenPlanner, tasks: Sequence[Task], evaluation: Evaluation, count: int = 12) -> list[dict]:
    """Held-out episodes for the report: the best ones first, with the grid of every planning step."""
    episodes = test_episodes(tasks)
    order = sorted(range(len(episodes)), key=lambda k: -evaluation.records[k].score.cells)
    chosen = order[: count // 2] + order[len(order) // 2 :][: count - count // 2]
    return [
        {
            "task_id": episodes[k].task_id,
            "index": episodes[k].index,
            "demonstrations": [(p.input, p.output) for p in episodes[k].demonstrations],
            "input": episodes[k].query,
            "target": episodes[k].answer,
            "plan": model.plan_steps(episodes[k]),
            "predicted": evaluation.records[k].attempts[0],
        }
        for k in chosen
    ]


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


def by_layer(members: Sequence[tuple[str, torch.nn.Parameter]]) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Named parameters by Qwen layer: layer 0 .. n - 1, and the rest (embedding, last norm) as "other"."""
    parts: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in members:
        layer = re.search(r"\blayers\.(\d+)\.", name)
        parts.setdefault(f"layer {layer[1]}" if layer else "other", []).append((name, parameter))
    return parts


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


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means; auto takes CUDA when there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda needs a CUDA build of torch and a visible GPU, got neither; pass --device cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {name!r}")
    return torch.device(name)


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
