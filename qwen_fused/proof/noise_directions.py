"""How much of a gradient is lost, measured along noise alone.

What is lost may stand at right angles to what is left, as two tasks' gradients do: along the gradient that is left
nothing of it would be seen. Squared slopes along random directions are to each other as the gradients' squared lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.moves import Values

# along which a length is estimated
COUNT = 2


@dataclass
class Loss:
    """A loss that is not quite the one which autograd differentiates, and what its slopes are found to be.

    Args:
        names: of the parameters that move.
        evaluate: the loss, as `Directions` asks for it.
        unknown: why it could not be measured.
        apart, measured, given: sums of squared slopes: of the difference, of this loss, of autograd's.
    """

    names: Collection[str]
    evaluate: Callable[[Values | None], float]
    unknown: str = ""
    apart: float = 0.0
    measured: float = 0.0
    given: float = 0.0

    @property
    def shares(self) -> tuple[float, float]:
        """The length of the gradients' difference over the larger of them, and of this loss's own over the larger.

        Both NaN where autograd's is zero.
        """
        larger = max(self.measured, self.given)
        if not self.given:
            return math.nan, math.nan
        return math.sqrt(self.apart / larger), math.sqrt(self.measured / larger)


class NoiseDirections(Directions):
    """Directions with nothing of the gradient in them."""

    def _begin(self, name: str, along: Tensor, gradient: Tensor, size: float) -> None:
        along.zero_()

    def _predict(self, step: float, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        # lengths are told to a hundredth: what a step is rounded to is no matter
        shares = {name: weights[name] * share for name, share in self._shares.items()}
        return sum(shares.values()), shares

    def _first_step(self, loss: float, scale: float) -> float:
        # in float32 a smaller one: what bends shows at a hundredth, what is rounded at a thousandth
        return super()._first_step(loss, scale) * (1.0 if self.wide else 0.1)

    def measure(self, losses: Sequence[Loss], at: float) -> None:
        """Measure slopes of several losses along the same directions, each of which is made once.

        Args:
            losses: are told what is found.
            at: their value at the point.
        """
        for number in range(COUNT):
            self._use(number)
            for loss in losses:
                if not loss.unknown:
                    self._add(loss, at)

    def _add(self, loss: Loss, at: float) -> None:
        weights = {name: float(name in loss.names) for name in self.parameters}
        slope, shares = self._predict(0.0, weights)
        scale = math.sqrt(sum(share * share for share in shares.values()))
        if not scale:
            return
        self.moves.evaluate = loss.evaluate
        step = self._first_step(at, scale)
        try:
            ends = self._loss_at(step, weights), self._loss_at(-step, weights)
        except Exception as error:
            # some code insists on its own type, and says so in its own way; or it makes other calls there
            loss.unknown = str(error).strip().partition("\n")[0] or type(error).__name__
            return
        if not abs(sum(ends) / 2 - at) <= 0.05 * abs(at) + 1e-6:
            loss.unknown = f"the loss is {sum(ends) / 2:.6g} there, not {at:.6g}"
            return
        measured = (ends[0] - ends[1]) / (2 * step)
        loss.apart += (measured - slope) ** 2
        loss.measured += measured**2
        loss.given += slope**2
