"""A point a small random step away from the given weights, where their zeros and kinks hide nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.gradients import is_written_to
from qwen_fused.proof.moves import Noise, has_nonzero, scales_of
from qwen_fused.proof.nonzero import zeros
from qwen_fused.proof.snapshot import Mark
from qwen_fused.proof.subject import Gradients, Subject
from qwen_fused.proof.trusted_ops import differentiate

# steps away from the given weights at which a zero gradient may come alive: what is zero still is zero for good
PERTURBATIONS = 3


class PerturbedPoint:
    """The point, the loss there and its gradients.

    Parameters whose gradient is zero are left where they are, as a step of any optimizer would leave them: what is
    still zero after the others have moved stays zero. A zero-initialised adapter's other side comes alive.
    """

    def __init__(self, subject: Subject, gradients: Gradients, first: Trace, attributes: Sequence[Mark]):
        self._subject = subject
        scales = scales_of(subject.trainable)
        # what modules kept after the first call is there for this one to find
        subject.snapshot.mark_attributes(attributes)
        for number in range(PERTURBATIONS):
            zero_before = zeros(gradients.of)
            perturb(subject.trainable, gradients.of, scales)
            self.values = {name: p.data.clone() for name, p in subject.trainable.items()}
            # a copy of each is slow, and for nothing where nobody's code comes near them
            theirs = subject.own_backward or gradients.erased or gradients.stepped or is_written_to(subject.trainable)
            self.at = differentiate(subject, first, take=not theirs)
            subject.snapshot.clear_gradients()
            still_zero = [name for name in zero_before if name in zeros(self.at.gradients.of)]
            if (
                self.at.trace.exchanges
                or not still_zero
                or len(still_zero) == len(zero_before)
                or number == PERTURBATIONS - 1
            ):
                break
            if self.at.gradients.stepped:
                self.return_to()
            gradients = self.at.gradients

    def return_to(self) -> None:
        """Put the parameters back here."""
        for name, parameter in self._subject.trainable.items():
            parameter.data.copy_(self.values[name])


def perturb(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Move every parameter whose gradient is not zero by a random hundredth of its size; the others stay."""
    noise = Noise(0)
    for name, gradient in gradients.items():
        if has_nonzero(gradient):
            noise.add_to(parameters[name].data, 0.02 * scales[name])
