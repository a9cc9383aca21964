"""A point a small random step away from the given weights, where their zeros and kinks hide nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.cuts import CustomOp, Trace
from qwen_fused.proof.derivative import scales_of
from qwen_fused.proof.nonzero import zeros
from qwen_fused.proof.replay import Slot
from qwen_fused.proof.subject import Gradients, Subject
from qwen_fused.proof.trusted_ops import LinearizedOp

# steps away from the given weights at which a zero gradient may come alive: what is zero still is zero for good
PERTURBATIONS = 3


class PerturbedPoint:
    """The point, the loss there and its gradients.

    Parameters whose gradient is zero are left where they are, as a step of any optimizer would leave them: what is
    still zero after the others have moved stays zero. A zero-initialised adapter's other side comes alive.
    """

    def __init__(self, subject: Subject, gradients: Gradients, first: Trace):
        self.subject = subject
        scales = scales_of(subject.trainable)
        for number in range(PERTURBATIONS):
            zero_before = zeros(gradients.of)
            perturb(subject.trainable, gradients.of, scales)
            self.linearized: dict[Slot, LinearizedOp] = {}
            self.trace: Trace = subject.trace(self._linearize_allowed, first)
            self.loss = self.trace.loss
            self.gradients = subject.gradients(self.loss)
            still_zero = [name for name in zero_before if name in zeros(self.gradients.of)]
            if not still_zero or len(still_zero) == len(zero_before) or number == PERTURBATIONS - 1:
                break
            gradients = self.gradients
        self._values = {name: p.data.clone() for name, p in subject.trainable.items()}

    def _linearize_allowed(self, op: CustomOp, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any) -> None:
        if self.subject.allow.custom(op.name, op.site.callers):
            self.linearized[op.slot] = LinearizedOp(call, args, kwargs, out)

    def return_to(self) -> None:
        """Put the parameters back here."""
        for name, parameter in self.subject.trainable.items():
            parameter.data.copy_(self._values[name])


def perturb(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Move every parameter whose gradient is not zero by a random hundredth of its size; the others stay."""
    for place, (name, gradient) in enumerate(gradients.items()):
        if gradient.any():
            parameter = parameters[name]
            generator = torch.Generator(device=parameter.device).manual_seed(place)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.data.add_((0.02 * scales[name] * noise).to(parameter.dtype))
