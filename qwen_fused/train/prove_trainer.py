"""Prove the trainer's own step, the prompt window's pass through Qwen included, on the run's own data."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_fused.arc.episodes import collate
from qwen_fused.proof.prove import ProofReport, prove
from qwen_fused.train.trainer import Trainer

# where a value loses its gradient on purpose
INTENDED_CUTS = (
    "efe_loss*",  # the hard mask, accuracy and predictions are argmaxed; the fused ops are taken at their word
    "hard_cell_cross_entropy*",  # as efe_loss, for the reversed plan
    "QwenPlanner.baseline",  # the plan under the unrefined prompt: argmaxed for the reward
    "PromptPolicy.forward",  # the sampled u is held fixed in its own log-probability
    "PromptPolicy.loss",  # reward, advantage and the states that curiosity observes
    "Curiosity.forward",  # the stopped target, and the action as an observation
)

# of each batch: an operation that cuts one episode off cuts them all, and the proof's ten passes run in float64 too
EPISODES = 4


def prove_trainer(trainer: Trainer) -> ProofReport:
    """Prove a trainer's step, on episodes of its first batch, from forward to optimizer; nothing changes.

    With a prompt window the step is a window of two batches that ask under the same prompts.

    Raises:
        RuntimeError: in the middle of a window, which the proof's own steps would spoil.
    """
    if trainer.window.batches:
        raise RuntimeError(f"prove before a window's first batch: this one has had {trainer.window.batches}")
    again = trainer.sampler.pool
    shares = again < min(trainer.sampler.window, trainer.sampler.batches_per_epoch())
    numbers = [0, again] if shares else [0]
    batches = [collate(trainer.sampler.batch(0, number)[:EPISODES]).to(trainer.device) for number in numbers]
    # the rates of the first batch after warm-up, or the rung "applied" would judge the warm-up
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.set_learning_rates(trainer.config.warmup_batches)
    scaling = trainer.scaler.state_dict()
    leaves: list[Tensor] = []

    def loss() -> Tensor:
        # every call is a window of its own, as weights differ from call to call
        trainer.window.discard()
        steps = [trainer.forward(batch, epoch=1) for batch in batches]
        leaves[:] = [pooled for _, pooled in steps]
        return torch.stack([out.loss for out, _ in steps]).mean()

    def backward(loss: Tensor) -> None:
        loss_scale = trainer.backward(loss, leaves)
        # a cut behind the window leaves nothing to flush, and is for the proof to name; the loss is a mean already
        if trainer.window.reached:
            trainer.window.flush(loss_scale)

    try:
        return prove(loss, trainer.model, trainer.optimizer, allow=INTENDED_CUTS, backward=backward, step=trainer.step)
    finally:
        trainer.window.discard()
        trainer.scaler.load_state_dict(scaling)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
