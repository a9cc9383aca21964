"""`qwen_fused.lightning.Prove`: the proof of the step that a Lightning Trainer is about to take."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from qwen_fused.proof.gradient_error import settle
from qwen_fused.proof.kept_state import kept, kept_random, overridden
from qwen_fused.proof.ladder import ProofReport
from qwen_fused.proof.prove import prove
from qwen_fused.proof.snapshot import Snapshot
from qwen_fused.proof.split_step import SplitStep


class Prove(Callback):
    """Proves a Lightning module's own training step before its first, and stops there where the gradient is broken.

    `Trainer(..., callbacks=[qwen_fused.lightning.Prove()])` is all: the first batch goes through `training_step`, the
    precision plugin, the module's backward and optimizer hooks, clipping and optimizer as they are; what it logs is
    dropped, other callbacks are not called, and everything is put back. Of an accumulated step one micro-batch is
    looked at; under manual optimization, the way from the first backward pass to the first optimizer's step.

    Args:
        allow: as in `prove`.
        only_warn: log the ladder where the gradient is broken, and go on.
        options: other keyword arguments of `prove`, `directions` and `seed` for example.

    Raises:
        GradientError: out of `trainer.fit()`, when the gradient is broken.
    """

    def __init__(self, *, allow: Iterable[str] = (), only_warn: bool = False, **options: Any):
        self.options = {"allow": tuple(allow) if not isinstance(allow, str) else (allow,), **options}
        self.only_warn = only_warn
        self.report: ProofReport | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every `fit` is proved anew."""
        self.report = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prove the step, once per `fit()`, when the trainer is about to take its first."""
        if self.report is not None:
            return
        self.report = _Loop(trainer, pl_module, copy.deepcopy(batch), batch_idx).prove(self.options)
        settle(self.report, self.only_warn, trainer.strategy.root_device)


class _Stepped(BaseException):
    """Leaves a manual step where it calls its first optimizer; no `except Exception` holds it."""


class _Loop:
    """One batch's turn in a Lightning trainer, as the functions that `prove` asks for."""

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any, number: int):
        self.trainer: Any = trainer
        self.strategy: Any = trainer.strategy
        self.module = module
        self.batch = batch
        self.number = number
        self.wrapped = list(self.strategy._lightning_optimizers)
        self.stepped: Any = None  # the first optimizer that a manual step calls
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)

    def prove(self, options: dict[str, Any]) -> ProofReport:
        scaling = self.scaler.state_dict() if self.scaler is not None else None
        with kept_random(), kept(self.module), self._alone():
            try:
                return self._automatic(options) if self.module.automatic_optimization else self._manual(options)
            finally:
                if self.scaler is not None:
                    self.scaler.load_state_dict(scaling)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Log nothing, call no callback, and add up no gradients of other processes."""

        def drop(*_: Any, **__: Any) -> None:
            return None

        callbacks, self.trainer.callbacks = self.trainer.callbacks, []
        with ExitStack() as stack:
            stack.callback(setattr, self.trainer, "callbacks", callbacks)
            for name in ("log", "log_dict"):
                stack.enter_context(overridden(self.module, name, drop))
            stack.enter_context(getattr(self.strategy, "block_backward_sync", nullcontext)())
            yield

    def _turn(self) -> Any:
        """The module's training step, under the precision plugin."""
        # whoever pops something from the batch pops it from a copy
        batch = copy.copy(self.batch) if isinstance(self.batch, (Mapping, list)) else self.batch
        numbered = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        return self.strategy.training_step(batch, *([self.number] if numbered else []))

    def _automatic(self, options: dict[str, Any]) -> ProofReport:
        (wrapped,) = self.wrapped
        optimizer = self.trainer.optimizers[0]

        def loss() -> Any:
            output = self._turn()
            value = output["loss"] if isinstance(output, Mapping) else output
            if value is None:
                raise ValueError("training_step must return a loss for its first batch, got None")
            return value / self.trainer.accumulate_grad_batches

        def backward(value: Tensor) -> None:
            self.strategy.backward(value, optimizer)

        def step() -> None:
            # the gradients are in place: the closure has nothing left to do
            closure = torch.zeros((), device=self.strategy.root_device).clone
            self.module.optimizer_step(self.trainer.current_epoch, self.number, wrapped, closure)

        return prove(loss, self.module, optimizer, backward=backward, step=step, **options)

    def _manual(self, options: dict[str, Any]) -> ProofReport:
        with ExitStack() as stack:
            for one in self.wrapped:
                stack.enter_context(overridden(one, "step", self._leave_at(one)))
            # what the optimizer does not hold is in none of the proof's own keeping
            state = Snapshot(self.module.parameters(), [self.module], self.trainer.optimizers, [self._turn])
            stack.callback(state.restore)
            # which optimizer steps first is found out with nothing sent back
            with overridden(self.strategy, "backward", lambda *_, **__: None):
                self._until_stepped()
            state.restore()
            split = SplitStep([self._until_stepped], self.strategy)
            if self.stepped is None:
                return prove(split.loss, self.module, backward=split.backward, **options)
            optimizer = self.stepped.optimizer
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}

            def step() -> None:
                type(self.stepped).step(self.stepped)

            parts = _parts(self.module, held)
            report = prove(split.loss, parts, optimizer, backward=split.backward, step=step, **options)
        if len(self.wrapped) > 1:
            report.notes.append(f"the first of {len(self.wrapped)} optimizers is judged, on what it holds")
        return report

    def _until_stepped(self) -> None:
        try:
            self._turn()
        except _Stepped:
            return

    def _leave_at(self, wrapped: Any) -> Any:
        def leave(*_: Any, **__: Any) -> None:
            self.stepped = self.stepped or wrapped
            raise _Stepped

        return leave


def _parts(module: nn.Module, held: set[int], prefix: str = "") -> dict[str, Any]:
    """Name -> the largest submodules whose every parameter is held, and the held parameters outside them."""
    parts: dict[str, Any] = {prefix + n: p for n, p in module.named_parameters(recurse=False) if id(p) in held}
    for name, child in module.named_children():
        own = [id(parameter) in held for parameter in child.parameters()]
        parts |= {prefix + name: child} if own and all(own) else _parts(child, held, f"{prefix}{name}.")
    return parts


__all__ = ["Prove"]
