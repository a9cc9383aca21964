"""The training step as CUDA graphs: what follows Qwen's pooled states, some thousand small launches, becomes a few.

    host            text, features, grids, rates ──► static tensors                    five launches
    eager           PromptWindow: Qwen, where a prompt is new ──► static leaf
    graph, a bucket projection, policy, plans, loss, backward ──► static gradients, the leaf's gradient, the figures
    eager           every `--prompt-window` batches: the window's flush through Qwen, and the whole update
    graph           else: norms, clipping, AdamW of the planner

A graph holds one shape. So canvases are squares of few sides (`SIDES`), and each has a graph of its own, recorded when
the shape comes for the second time: the first batch of it runs as ever, which compiles what has to be compiled. A batch
of another size than the others, the last of a pass, always does. The sum of a loss is that of the same cells on a
larger canvas, up to rounding.

Nothing recorded looks at the host: the policy's noise is drawn outside of it, the share of the size loss, the learning
rates and the scaler's scale are tensors. So a step is the same whether it is replayed or not, bit for bit, and a run
that is continued, which begins without graphs, is the unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_fused.arc.episodes import MAX_SIDE, Batch
from qwen_fused.arc.features import FEATURES
from qwen_fused.common.cuda_graphs import Record, Replay
from qwen_fused.loss import checks
from qwen_fused.norms.stats import GradStats
from qwen_fused.train.planner_step import Backward, PlannerStep, unscaled

T = TypeVar("T")
# sides of a canvas: the frequent ones of ARC, as between 16 and 20 a step's time hardly differs
SIDES = (6, 10, 12, 16, 20, 25, MAX_SIDE)
# what a parameter's learning rate is on the device, where torch's kernel reads it
RATE_DTYPE = {"cuda": torch.float32, "cpu": torch.float64}


def bucket_canvas(sides: Sequence[int]) -> tuple[int, int]:
    """The square canvas of few sizes that holds episodes of the given longest sides."""
    longest = max(sides)
    side = next((side for side in SIDES if side >= longest), longest)
    return side, side


def as_held(rate: float, device: torch.device) -> float:
    """A learning rate as the device holds it."""
    return torch.tensor(rate, dtype=RATE_DTYPE[device.type]).item()


@dataclass
class StepTensors:
    """What a batch brings to a recorded step: written before each replay, in place."""

    batch: Batch  # without episodes
    integers: Tensor  # the memory of the batch's tensors
    floats: Tensor  # the memory of the three next
    features: Tensor  # [B, 15]
    truncated: Tensor  # []
    shares: Tensor  # [2], of the plan's loss and the size loss
    noise: Tensor  # [B, D]
    pooled: Tensor  # [B, P], a leaf

    @classmethod
    def like(cls, batch: Batch, pooled: Tensor, width: int) -> StepTensors:
        """Memory for batches of the shape of this one, which it holds, on the device of `pooled`; width is D."""
        device, count = pooled.device, len(pooled)
        tensors = integer_tensors(batch)
        integers = packed(tensors).to(device, non_blocking=True)
        parts = integers.split([even(x.numel()) for x in tensors])
        query, target, query_size, target_size = (
            part[: x.numel()].view_as(x) for part, x in zip(parts, tensors, strict=True)
        )
        floats = torch.zeros(count * len(FEATURES) + 3, dtype=torch.float32, device=device)
        features, truncated, shares = floats.split([count * len(FEATURES), 1, 2])
        return cls(
            Batch([], query, target, query_size, target_size),
            integers,
            floats,
            features.view(count, -1),
            truncated[0],
            shares,
            torch.zeros(count, width, dtype=torch.float32, device=device),
            torch.zeros_like(pooled).requires_grad_(),
        )

    @torch.no_grad()
    def fill(
        self, batch: Batch, features: Tensor, truncated: float, shares: tuple[float, float], pooled: Tensor
    ) -> None:
        """Write a batch, all but `pooled` from the host; noise is drawn, as the policy would."""
        send(self.integers, packed(integer_tensors(batch)))
        send(self.floats, torch.cat([features.reshape(-1), torch.tensor([truncated, *shares], dtype=torch.float32)]))
        self.pooled.copy_(pooled)
        self.noise.normal_()


def integer_tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a batch, in one order."""
    return batch.query, batch.target, batch.query_size, batch.target_size


def even(count: int) -> int:
    """Elements that take whole 16 bytes, so that what comes behind them begins where a tensor of its own might."""
    return count + count % 2


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Integer tensors one behind the other."""
    return torch.cat([F.pad(x.reshape(-1), (0, x.numel() % 2)) for x in tensors])


def send(static: Tensor, host: Tensor) -> None:
    """Overwrite a static tensor with one of the host, without waiting."""
    static.copy_(host.pin_memory() if static.is_cuda else host, non_blocking=True)


class GraphedStep:
    """Replays a trainer's step where its shape is recorded.

    Args:
        trainer: whose step it is.
        record: as `CudaGraphs.record`.
    """

    def __init__(self, trainer: PlannerStep, record: Record):
        self.trainer, self.record = trainer, record
        self.parameters = [p for name, group in trainer.groups.items() if name != "qwen" for _, p in group]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        groups = trainer.optimizer.param_groups
        self.rates = torch.zeros(len(groups), dtype=RATE_DTYPE[trainer.device.type], device=trainer.device)
        # why recording failed, if it did: every step is an eager one from then on
        self.failure: str | None = None
        self.told = False
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded: the trainer's tensors are others now."""
        self.seen: set[tuple[int, ...]] = set()
        self.steps: dict[tuple[int, ...], tuple[StepTensors, Replay[tuple[Backward, Tensor]]]] = {}
        self.update: Replay[GradStats] | None = None
        self.reached = [False] * len(self.parameters)

    def backward(self, batch: Batch, pooled: Tensor, epoch: int) -> Backward | None:
        """Forward and backward of a batch by a replay, gradients included; None where it is for the eager step to do.

        Args:
            batch: on the host, on a bucket's canvas.
            pooled: [B, P] the window's leaf; gets its gradient.
            epoch: for the curriculum.
        """
        step = self._step(batch, pooled)
        if step is None:
            return None
        (tensors, replay), model = step, self.trainer.model
        features, truncated = model.prompt.describe([episode.demonstrations for episode in batch.episodes])
        tensors.fill(batch, features, truncated, model.objective.shares(epoch), pooled)
        done, leaf_gradient = replay()
        for parameter, gradient, reached in zip(self.parameters, self.gradients, self.reached, strict=True):
            parameter.grad = gradient if reached else None
        # the next replay overwrites them
        pooled.grad = leaf_gradient.clone()
        return Backward(done.values.clone(), done.loss_scale)

    def step(self) -> GradStats:
        """`Trainer.step` behind `backward`, where Qwen has no gradient; eager where it can't be recorded."""
        trainer, groups = self.trainer, self.trainer.optimizer.param_groups
        # what an optimizer makes at a parameter's first step would be made anew at each replay
        stepped = all(trainer.optimizer.state.get(p) for p in self.parameters if p.grad is not None)
        if self.update is None and self.failure is None and stepped:
            self.update = self._try(self._record_update)
        if self.update is None:
            return trainer.step()
        send(self.rates, torch.tensor([group["lr"] for group in groups], dtype=self.rates.dtype))
        stats = self.update()
        # to autograd a replay is the write that it is
        torch.autograd.graph.increment_version(self.parameters)
        return stats

    def _step(self, batch: Batch, pooled: Tensor) -> tuple[StepTensors, Replay[tuple[Backward, Tensor]]] | None:
        """What is recorded for a batch; recorded now where its shape comes for the second time."""
        shape, trainer = tuple(batch.query.shape), self.trainer
        whole = len(batch.episodes) == trainer.config.batch_size
        if self.failure or not whole or torch.is_anomaly_enabled() or checks.check_targets:
            return None
        if shape in self.steps:
            return self.steps[shape]
        if shape not in self.seen:
            self.seen.add(shape)
            return None
        tensors = StepTensors.like(batch, pooled, trainer.config.prompt_dim)
        replay = self._try(lambda: self.record(lambda: self._backward(tensors)))
        if replay is not None:
            self.steps[shape] = tensors, replay
        return self.steps.get(shape)

    def _backward(self, tensors: StepTensors) -> tuple[Backward, Tensor]:
        """`Trainer.backward_of` on static tensors: what is recorded of a shape."""
        trainer, batch = self.trainer, tensors.batch
        with trainer.autocast():
            encoded = trainer.model.prompt.embed(tensors.pooled, tensors.features, tensors.truncated)
            out = trainer.model.score(encoded, batch, tensors.shares.unbind(), tensors.noise)
        # without `.grad`: an accumulation would be tied to the stream of the eager steps before
        found = torch.autograd.grad(
            trainer.scaler.scale(out.loss), [*self.parameters, tensors.pooled, out.prompt], allow_unused=True
        )
        *gradients, leaf_gradient, prompt_gradient = found
        self.reached = [gradient is not None for gradient in gradients]
        kept = [(static, new) for static, new in zip(self.gradients, gradients, strict=True) if new is not None]
        torch._foreach_copy_([static for static, _ in kept], [new for _, new in kept])
        done = trainer.after_backward(out, prompt_gradient, batch.target, trainer.ranks.part(len(batch.query)))
        return done, unscaled(leaf_gradient, done.loss_scale, trainer.ranks)

    def _record_update(self) -> Replay[GradStats]:
        """Record `Trainer.step` with learning rates that are read on the device."""
        groups = self.trainer.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
        try:
            return self.record(self.trainer.step)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def new_failure(self) -> str | None:
        """Why recording failed, once."""
        told, self.told = self.told, self.failure is not None
        return None if told else self.failure

    def _try(self, recording: Callable[[], Replay[T]]) -> Replay[T] | None:
        """Record; where that fails, let every step from now on be an eager one."""
        scaler, optimizer = self.trainer.scaler, self.trainer.optimizer
        try:
            return recording()
        except RuntimeError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.failure = f"the step can't be recorded as a CUDA graph: {reason[0]}"
        # an update that was half recorded has unscaled nothing
        if scaler.is_enabled():
            scaler._per_optimizer_states.clear()
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)
        self.forget()
        return None


def wants_graphs(trainer: PlannerStep) -> bool:
    """Whether a trainer's steps are to be recorded: on CUDA, by one process, unless the configuration says off."""
    return trainer.config.cuda_graphs == "auto" and trainer.device.type == "cuda" and trainer.ranks.world_size == 1
