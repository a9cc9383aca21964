"""One training step and everything it needs: model, optimizer, data order, loss scaling, and their saved state."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_fused.arc.episodes import Batch, Episode, collate, load_tasks
from qwen_fused.arc.sampler import EpisodeSampler
from qwen_fused.arc.split import divide
from qwen_fused.common.cuda_graphs import CudaGraphs
from qwen_fused.common.device import resolve_device, to_host
from qwen_fused.common.layers import group_by_number
from qwen_fused.common.random_state import rng_state, set_rng_state
from qwen_fused.config import TrainConfig
from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import nonfinite_message
from qwen_fused.parallel.processes import Part, Ranks
from qwen_fused.planner.model import QwenPlanner, StepOutput
from qwen_fused.train.checkpoint import save_checkpoint
from qwen_fused.train.full_state import full_state, shard_optimizer_state, shard_state
from qwen_fused.train.graphed_step import GraphedStep, as_held, bucket_canvas, wants_graphs
from qwen_fused.train.monitor import REMEDIES, GradientMonitor, Hint
from qwen_fused.train.optimizer import MasterAdamW
from qwen_fused.train.pending import SCALARS, PendingBatch
from qwen_fused.train.planner_step import Backward, PlannerStep
from qwen_fused.train.resume import fingerprint
from qwen_fused.train.schedule import learning_rate, optimizer_groups
from qwen_fused.train.window_state import gather_window_state, scatter_window_state
from qwen_fused.window.prompt_window import PromptWindow

if TYPE_CHECKING:
    from qwen_fused.parallel.fsdp import ShardedQwen

# fp16's scaler halves its scale at each overflow; this many in a row is no longer a matter of scale
MAX_OVERFLOWS = 25


class TrainingStopped(RuntimeError):
    """The run had to stop; the message says why and what to do, `metrics` are those of the batch at fault."""

    def __init__(self, reason: str, metrics: dict[str, Any] | None = None):
        super().__init__(reason)
        self.metrics = metrics


@dataclasses.dataclass
class Progress:
    """How far a run is; saved in every checkpoint."""

    step: int = 0
    best_accuracy: float = -1.0
    nonfinite: int = 0
    overflows: int = 0
    # Qwen's rows of the gradient norms, as of the last flush of the prompt window
    qwen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class Trainer(PlannerStep):
    """Model, optimizer and data of a run, built from its configuration; `train.run_batches` is the loop.

    Args:
        config: of the run.
        folder: of the run.
        ranks: this process among those that train together.
    """

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks | None = None):
        self.config, self.folder, self.ranks = config, folder, ranks or Ranks()
        self.device = resolve_device(self.ranks.device(config.device))
        collection = load_tasks(config.dataset)
        self.skipped = collection.skipped
        division = divide(collection.tasks, config.val_fraction, config.split_seed, config.held_out)
        self.training, self.held_out, self.notes = division.training, division.held_out, division.notes
        self.fingerprint = fingerprint(self.training, self.held_out)
        self.sampler = EpisodeSampler(
            self.training,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=config.augment,
            window=config.prompt_window,
            visits=config.prompt_visits,
        )
        torch.manual_seed(config.seed)
        self.model = QwenPlanner(config).to(self.device).train()
        self.window = PromptWindow(self.model.prompt.pooled, config.prompt_window, mode=config.window_mode)
        self.sharded: ShardedQwen | None = None
        if config.shard_qwen and self.ranks.world_size > 1:
            # a second of imports that one process has no use for
            from qwen_fused.parallel.fsdp import ShardedQwen

            self.sharded = ShardedQwen(self.model.prompt.backbone, self.device, self.ranks.world_size)
            self.window.parameters = self.sharded.shards
        self.groups = self.model.groups()
        # float32 masters for bfloat16 weights
        self.optimizer = MasterAdamW(optimizer_groups(self.groups, config), lr=0.0, betas=(0.9, 0.98))
        self.norms = GroupGradNorm({**self.groups, "qwen": _by_layer(self.groups["qwen"])})
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.graphs = GraphedStep(self, CudaGraphs(self.device).record) if wants_graphs(self) else None
        self.progress = Progress()
        self.monitor = GradientMonitor(qwen_lr=config.qwen_lr)
        self.hints: list[Hint] = []
        self.layer_norms: dict[str, float] = {}

    @property
    def total_batches(self) -> int:
        """Batches in all epochs; the learning-rate schedule spans them."""
        return self.config.epochs * self.sampler.batches_per_epoch()

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set each group's rate for a batch, as `learning_rate` has it; returns the rates by group."""
        for group in self.optimizer.param_groups:
            group["lr"] = as_held(learning_rate(group["peak"], step, self.total_batches, self.config), self.device)
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def train_step(self, episodes: Sequence[Episode], epoch: int, *, flush: bool = True) -> PendingBatch:
        """One batch: forward, backward, unscale, norms, clip, step. Nothing here waits for the device.

        Args:
            episodes: the batch.
            epoch: for the curriculum.
            flush: whether the batch is the last of its prompt window: Qwen gets the window's gradient and steps.
                Its parameters have no gradient at the other batches, and the optimizer leaves them alone.

        Returns:
            What `read` turns into the batch's metrics, best asked for when the next batch is under way.
        """
        rates, part = self.set_learning_rates(self.progress.step), self.ranks.part(len(episodes))
        batch = collate(episodes, canvas=bucket_canvas([e.side for e in episodes]) if self.graphs else None)
        self.optimizer.zero_grad(set_to_none=True)
        pooled = self.prompts(batch[part.rows])
        done = self.graphs.backward(batch, pooled, epoch) if self.graphs else None
        # where nothing is recorded for it, as it always was; a window's last step holds Qwen's, which is not recorded
        update = self.graphs.step if self.graphs and done and not flush else self.step
        done = done or self.backward_of(batch.to(self.device), pooled, epoch, part)
        if flush:
            with self.sharded.flushing() if self.sharded else nullcontext():
                # the mean over the window's batches
                self.window.flush(done.loss_scale / self.window.batches)
        self.ranks.all_reduce_gradients(self.norms.parameters)
        stats = update()
        self.progress.step += 1
        values = to_host(done.values)
        return PendingBatch(self.progress.step, epoch, len(episodes), flush, rates, values, stats.read_later())

    def backward_of(self, batch: Batch, pooled: Tensor, epoch: int, part: Part) -> Backward:
        """Forward and backward of one batch, as far as the window's leaf, which gets its gradient."""
        out, _ = self.forward(batch[part.rows], epoch=epoch, part=part, pooled=pooled)
        out.prompt.retain_grad()
        self.backward(out.loss * part.weight, [pooled])
        assert out.prompt.grad is not None
        return self.after_backward(out, out.prompt.grad, batch.target, part)

    def read(self, pending: PendingBatch) -> dict[str, Any]:
        """The metrics of a batch, in the order in which the batches ran.

        `hints` are then what they made show, and `layer_norms` those of Qwen's layers at the last flush.

        Raises:
            TrainingStopped: its gradient was NaN or Inf and the configuration says stop.
        """
        gradients: dict[str, dict[str, Any]] = pending.stats.result()
        measured = dict(zip(SCALARS, pending.values.tolist(), strict=True))
        bad = nonfinite_message(gradients)
        fault = self._on_nonfinite(pending.step, bad, measured["loss"]) if bad else None
        if bad is None:
            self.progress.overflows = 0
        # between flushes Qwen has no gradient to measure: the last one stands
        if pending.flushed:
            self.progress.qwen = {name: row for name, row in gradients.items() if name.split("/")[0] == "qwen"}
        gradients = {name: row for name, row in gradients.items() if name.split("/")[0] != "qwen"} | self.progress.qwen
        metrics: dict[str, Any] = {
            "step": pending.step,
            "epoch": pending.epoch,
            **measured,
            "qwen_grad": self.progress.qwen["qwen"]["norm"] if self.progress.qwen else None,
            **{f"{name}_grad": gradients[name]["norm"] for name in ("agent", "policy")},
            "nonfinite": self.progress.nonfinite,
            "lr_qwen": pending.rates["qwen"],
            "lr_agent": pending.rates["agent"],
        }
        self.layer_norms = {
            name.removeprefix("qwen/"): row["norm"] for name, row in gradients.items() if name.startswith("qwen/")
        }
        self.hints = self.monitor.observe(pending.step, metrics, gradients)
        if self.graphs and (failure := self.graphs.new_failure()):
            self.hints.append(Hint("no graph", pending.step, failure, REMEDIES["no graph"]))
        if fault:
            raise TrainingStopped(fault, metrics)
        return metrics

    def forward(
        self, batch: Batch, *, epoch: int, part: Part | None = None, pooled: Tensor | None = None
    ) -> tuple[StepOutput, Tensor]:
        """The model's forward under the run's precision, and the window's leaf [B, P] that it starts from.

        Args:
            batch: episodes.
            epoch: for the curriculum.
            part: where they are part of a larger batch: which.
            pooled: what `prompts` gave for the batch; asked for here when left out.
        """
        noise = None
        pooled = self.prompts(batch) if pooled is None else pooled
        if part is not None and self.ranks.world_size > 1:
            noise = torch.randn(part.batch_size, self.config.prompt_dim, device=self.device)[part.rows]
        with self.autocast():
            return self.model(batch, epoch=epoch, pooled=pooled, noise=noise), pooled

    def prompts(self, batch: Batch) -> Tensor:
        """The window's leaf [B, P] for a batch: Qwen reads what it has not read in this window."""
        if self.sharded:
            self.sharded.gather()
        with self.autocast():
            return self.window.prompts([episode.demonstrations for episode in batch.episodes])

    def _on_nonfinite(self, step: int, bad: str, loss: float) -> str | None:
        """Count a batch whose gradient is not finite; why to stop, where configuration or a stuck scaler says so."""
        self.progress.nonfinite += 1
        self.progress.overflows += 1
        stuck = self.progress.overflows >= MAX_OVERFLOWS
        if stuck or (self.config.on_nonfinite == "stop" and not self.scaler.is_enabled()):
            return (
                f"batch {step}: {bad}; the loss was {loss:.4g}. That batch was not applied. Lower --qwen-lr "
                "and --agent-lr, or pass --on-nonfinite skip to count such batches and go on."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs; the data order follows from the step alone.

        The same for any number of processes, each of which must ask for it.
        """
        return {
            "model": self.weights(),
            "optimizer": full_state(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "window": gather_window_state(self.window, self._window_keys(), self.ranks),
            "monitor": self.monitor.state_dict(),
            "rng": rng_state(self.device),
            "origin": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, into a run of any number of processes."""
        self.model.load_state_dict(shard_state(state["model"], self.model.state_dict()))
        # rates and decay are the configuration's: the optimizer would take them from the checkpoint
        given = [{name: group[name] for name in ("peak", "weight_decay")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.optimizer))
        for group, settings in zip(self.optimizer.param_groups, given, strict=True):
            group.update(settings)
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.monitor.load_state_dict(state["monitor"])
        window, keys = scatter_window_state(state["window"], self._window_keys(), self.ranks)
        self.window.load_state_dict(window, keys, self.device)
        set_rng_state(state["rng"], self.device)
        if self.graphs:
            self.graphs.forget()

    def weights(self) -> dict[str, Tensor]:
        """The model's state; every process must ask for it."""
        return full_state(self.model.state_dict())

    def _window_keys(self) -> list[list[Hashable]]:
        """The keys of the prompt window's batches so far."""
        epoch, index = divmod(self.progress.step, self.sampler.batches_per_epoch())
        start = self.sampler.window_start(index)
        batches = [self.sampler.batch(epoch, k) for k in range(start, index)]
        return [[episode.demonstrations for episode in batch] for batch in batches]

    def save(self) -> Path:
        """Write a checkpoint of this moment; every process must call it, and the first one writes."""
        state, folder = self.state_dict(), self.folder / "checkpoints"
        if not self.ranks.is_main:
            return folder
        return save_checkpoint(folder, self.progress.step, state, keep=self.config.keep_checkpoints)


def _by_layer(members: Sequence[tuple[str, torch.nn.Parameter]]) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Qwen's named parameters, layer by layer."""
    named = dict(members)
    return {layer: [(name, named[name]) for name in names] for layer, names in group_by_number(named).items()}
