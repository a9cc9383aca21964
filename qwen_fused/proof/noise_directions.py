"""How much of a gradient is lost, measured along noise alone.

What is lost may stand at right angles to what is left, as two tasks' gradients do: along the gradient that is left
nothing of it would be seen. Squared slopes along random directions are to each other as the gradients' squared lengths.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from qwen_fused.proof.derivative import Directions

# along which a length is estimated
COUNT = 2


class NoiseDirections(Directions):
    """Directions with nothing of the gradient in them."""

    def _shape(self, mixed: Tensor) -> None:
        mixed.zero_()

    def change_along(self, names: Collection[str], loss: float) -> tuple[float, float]:
        """How far measured and autograd's gradient of the named parameters lie apart.

        Args:
            names: of the parameters that move.
            loss: at the point.

        Returns:
            The length of their difference over the larger of the two, and the measured one's over the larger of the
            two: both NaN where autograd's is zero.

        Raises:
            ValueError: when the loss is another as it is evaluated here.
        """
        weights = {name: float(name in names) for name in self.parameters}
        apart = measured = given = 0.0
        for number in range(COUNT):
            self._use(number)
            slope, shares = self._predict(self.last / 10, weights)
            scale = math.sqrt(sum(share * share for share in shares.values()))
            if not scale:
                return math.nan, math.nan
            step = self._first_step(loss, scale)
            ends = self._loss_at(step, weights), self._loss_at(-step, weights)
            if abs(sum(ends) / 2 - loss) > 0.05 * abs(loss) + 1e-6:
                raise ValueError(f"the loss is {sum(ends) / 2:.6g} there, not {loss:.6g}")
            deviation = self._deviation(step, weights, scale, ends)[0] * scale
            apart += deviation**2
            measured += (slope + deviation) ** 2
            given += slope**2
        larger = max(measured, given)
        return math.sqrt(apart / larger), math.sqrt(measured / larger)
