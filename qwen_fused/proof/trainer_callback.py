"""`qf.ProveCallback`: the proof of the step that transformers' Trainer, or one of trl's, is about to take."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_fused.proof.gradient_error import settle
from qwen_fused.proof.kept_state import kept, kept_random, overridden, override
from qwen_fused.proof.ladder import ProofReport
from qwen_fused.proof.prove import prove
from qwen_fused.proof.split_step import SplitStep

# of an accumulated step: enough to see that one doesn't undo another
MICRO_BATCHES = 2


class ProveCallback(TrainerCallback):
    """Proves a Trainer's own training step before its first, and stops the run there where the gradient is broken.

    For transformers' Trainer and what derives from it (trl). `Trainer(..., callbacks=[qf.ProveCallback()])` is all: the
    first batch goes through the trainer's `training_step`, `compute_loss`, autocast, gradient scaler, clipping and
    optimizer as they are, and everything is put back. Of an accumulated step two micro-batches are looked at. The
    run then goes on as if nothing had been.

    Args:
        allow: as in `prove`.
        only_warn: log the ladder where the gradient is broken, and go on.
        options: other keyword arguments of `prove`, `directions` and `seed` for example.

    Raises:
        GradientError: out of `trainer.train()`, when the gradient is broken.
    """

    def __init__(self, *, allow: Iterable[str] = (), only_warn: bool = False, **options: Any):
        self.options = {"allow": tuple(allow) if not isinstance(allow, str) else (allow,), **options}
        self.only_warn = only_warn
        self.report: ProofReport | None = None
        self._trainer: Any = None
        self._batches: tuple[list[Any], Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Ask for the first batches when the trainer fetches them.

        Args:
            args, state, control, rest: as the trainer hands them over.
        """
        self._trainer, self.report = _caller(self), None
        fetch = self._trainer.get_batch_samples

        def keep(*positional: Any, **named: Any) -> Any:
            undo()
            samples, items = fetch(*positional, **named)
            self._batches = list(samples), items
            return samples, items

        undo = override(self._trainer, "get_batch_samples", keep)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Prove the step, once per `train()`, when the trainer is about to take its first.

        Args:
            args, state, control, rest: as the trainer hands them over.

        Raises:
            GradientError: when the gradient is broken, unless `only_warn`.
        """
        if self._batches is None:
            return
        trainer, (samples, items) = self._trainer, self._batches
        self._trainer = self._batches = None
        self.report = _prove(trainer, samples[:MICRO_BATCHES], len(samples), items, self.options)
        settle(self.report, self.only_warn, args.device)


def _caller(callback: ProveCallback) -> Any:
    """The trainer that is calling: callbacks are handed everything of it but itself."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if hasattr(owner, "training_step") and callback in getattr(handler, "callbacks", ()):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("ProveCallback must be called by a transformers Trainer that has it among its callbacks")


def _prove(trainer: Any, samples: list[Any], whole: int, items: Any, options: dict[str, Any]) -> ProofReport:
    model, accelerator, wrapper = trainer.model_wrapped, trainer.accelerator, trainer.optimizer
    gradient_state = accelerator.gradient_state
    optimizer = wrapper
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    scaler = accelerator.scaler

    @contextmanager
    def micro_batch(number: int) -> Iterator[None]:
        # each process judges its own loss by its own gradient
        gradient_state._set_sync_gradients(number + 1 == len(samples))
        with accelerator.no_sync(model) if hasattr(model, "no_sync") else nullcontext():
            yield

    def step() -> None:
        gradient_state._set_sync_gradients(True)
        if trainer.args.max_grad_norm:
            clip = getattr(trainer, "_clip_grad_norm", None)
            clip(model) if clip else accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        wrapper.step()
        if scaler is not None:
            scaler.load_state_dict(scaling)

    scaling = scaler.state_dict() if scaler is not None else {}
    # as the step itself begins, or the rung "declared" would find a model fresh from evaluation
    model.train()
    synced = gradient_state.sync_gradients
    with kept_random(), kept(trainer, trainer.state, wrapper):
        # moved to the device, or sampled from the model (trl), once
        ready = [trainer._prepare_inputs(copy.deepcopy(sample)) for sample in samples]
        turns = [_turn(trainer, model, inputs, items) for inputs in ready]
        split = SplitStep(turns, accelerator, entering=micro_batch)
        try:
            with overridden(trainer, "_prepare_inputs", lambda inputs: inputs):
                report = prove(split.loss, trainer.model, optimizer, backward=split.backward, step=step, **options)
        finally:
            gradient_state._set_sync_gradients(synced)
            if scaler is not None:
                scaler.load_state_dict(scaling)
    if len(samples) < whole:
        report.notes.append(f"of the step's {whole} micro-batches the first {len(samples)} are judged")
    if split.sent > 1:
        report.notes.append(f"training_step sends {split.sent} losses back; the first is judged")
    return report


def _turn(trainer: Any, model: Any, inputs: Any, items: Any) -> Callable[[], Any]:
    def turn() -> Any:
        with kept(trainer, trainer.state):
            # whoever pops the labels pops them from a copy
            batch = copy.copy(inputs) if isinstance(inputs, Mapping) else inputs
            return trainer.training_step(model, batch, items)

    return turn


__all__ = ["ProveCallback"]
