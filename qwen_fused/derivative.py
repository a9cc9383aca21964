"""Compare autograd's directional derivative <g, v> with the loss itself, moved a little along v and back.

    D(h) = (L(p + h v) - L(p - h v)) / 2h = <g, v> + O(h^2)

Two step sizes give Richardson's estimate (4 D(h/2) - D(h)) / 3 and, from their disagreement, its error; the loss's
rounding adds to that error. A direction is judged only where the error is small against the gradient's own scale, so
that neither a coarse data type nor a kink (ReLU) raises a false alarm: what does not settle as h changes is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# relative deviation that counts as agreement, and the largest relative error at which a direction is judged at all
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2}
JUDGED_BELOW = 0.1


@dataclass(frozen=True)
class Estimate:
    """How far the measured derivative is from autograd's at one pair of steps, relative to the gradient's scale."""

    step: float
    deviation: float
    error: float


@dataclass
class Verdict:
    """What one direction showed.

    Args:
        ok: agreement, or None where it could not be judged.
        deviation: measured minus autograd's derivative, relative to the root of the summed squares of all shares.
        resolution: the smallest relative deviation that would have been seen.
        ratio: measured over autograd's derivative.
        shares: parameter name -> its part of autograd's derivative, relative to the same scale.
        reason: why it was not judged, or how it was.
    """

    ok: bool | None
    deviation: float
    resolution: float
    ratio: float
    shares: dict[str, float] = field(default_factory=dict)
    reason: str = ""


class Directions:
    """Random directions in the space of the parameters, and the loss along them.

    A direction mixes noise with the gradient itself, parameter by parameter, each scaled to the parameter's own size.
    From the second direction on, parameters take part with random signs and with weights that make their shares alike,
    so that a small layer's wrong gradient is not drowned by a large one's.

    Args:
        parameters: name -> parameter, at the point where the gradients were taken.
        gradients: name -> gradient.
        evaluate: the loss as a float, the same function at each call.
        dtype: coarsest floating-point type that the loss is computed in.
        loss_dtype: type of the loss itself.
        seed: for the directions.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        evaluate: Callable[[], float],
        dtype: torch.dtype,
        loss_dtype: torch.dtype,
        seed: int,
    ):
        self.parameters = {name: p for name, p in parameters.items() if name in gradients}
        self.gradients = gradients
        self.evaluate = evaluate
        self.dtype = dtype
        self.seed = seed
        self.base = {name: p.data.clone() for name, p in self.parameters.items()}
        self.scales = scales_of(self.parameters)
        self.tolerance = TOLERANCE.get(dtype, 1e-2)
        # what the loss is rounded to, with a margin for the operations before it; 16-bit rounding averages out in part
        self.noise = max(4 * torch.finfo(loss_dtype).eps, 2e-4 if dtype in (torch.float16, torch.bfloat16) else 0.0)

    def check(self, number: int, loss: float, wobble: float = 0.0) -> Verdict:
        """Judge one direction.

        Args:
            number: which direction; the first has every parameter's gradient with its own sign.
            loss: value at the point itself.
            wobble: by how much the loss differs between two evaluations at the same point.
        """
        weights = self._weights(number)
        shares = self._predict(self._first_step(), number, weights)[1]
        scale = math.sqrt(sum(share * share for share in shares.values()))
        if not math.isfinite(loss) or not math.isfinite(scale):
            return Verdict(None, math.nan, math.nan, math.nan, reason="the loss or its gradient is not finite")
        if scale == 0:
            return Verdict(None, math.nan, math.nan, math.nan, reason="the gradient is zero")
        floor = self.noise * abs(loss) + wobble
        first = min(max(self._target() * abs(loss) / scale, self._first_step()), self._last_step())
        estimates: list[Estimate] = []
        for start in (first, first / 8, min(4 * first, 2 * self._last_step()), first / 64):
            estimate, slope = self._estimate(start, number, weights, scale, floor)
            estimates.append(estimate)
            good = min(estimates, key=lambda e: e.error)
            resolution = self.tolerance + 3 * good.error
            if abs(good.deviation) <= resolution and 3 * good.error <= 0.05:
                break
        shares = {name: share / scale for name, share in shares.items()}
        ratio = 1 + good.deviation * scale / slope if slope else math.nan
        verdict = Verdict(None, good.deviation, resolution, ratio, shares)
        if good.error > JUDGED_BELOW:
            verdict.reason = f"the loss is too coarse or too bent: its derivative is known to {good.error:.0%} only"
        elif abs(good.deviation) <= resolution:
            verdict.ok = True
        elif not self._settled(estimates):
            verdict.reason = "the measured derivative does not settle as the step gets smaller"
        else:
            verdict.ok = self._is_kink(good, number, weights, loss, scale)
            verdict.reason = "a kink: autograd's value lies between the slopes to both sides" if verdict.ok else ""
        return verdict

    def wrong_among(self, groups: Mapping[str, list[str]], step: float = 1e-2) -> list[str]:
        """Names of the groups of parameters whose own derivative deviates, each group judged alone."""
        found = []
        for group, names in groups.items():
            weights = {name: float(name in names) for name in self.parameters}
            shares = self._predict(step, 0, weights)[1]
            scale = math.sqrt(sum(share * share for share in shares.values()))
            if scale and abs(self._estimate(step, 0, weights, scale, 0.0)[0].deviation) > 5 * self.tolerance:
                found.append(group)
        return found

    def _settled(self, estimates: list[Estimate]) -> bool:
        """Whether different steps agree on the deviation: noise and jumps don't."""
        usable = sorted((e for e in estimates if e.error <= JUDGED_BELOW), key=lambda e: e.error)[:2]
        if len(usable) < 2 or any(abs(e.deviation) <= self.tolerance + 3 * e.error for e in usable):
            return False
        one, other = (e.deviation for e in usable)
        return abs(one - other) <= 0.3 * max(abs(one), abs(other))

    def restore(self) -> None:
        """Put the parameters back to the point where they were."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.base[name])

    def _first_step(self) -> float:
        return {torch.float64: 1e-5, torch.float32: 1e-3}.get(self.dtype, 1e-2)

    def _last_step(self) -> float:
        return {torch.float64: 1e-3, torch.float32: 3e-2}.get(self.dtype, 1e-1)

    def _target(self) -> float:
        """Change of the loss to aim at, relative to the loss: the cube root of its precision balances both errors."""
        return {torch.float64: 6e-6, torch.float32: 2.5e-3}.get(self.dtype, 5e-2)

    def _direction(self, number: int, weights: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        for place, (name, parameter) in enumerate(self.parameters.items()):
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(self.seed * 7919 + number * 104729 + place)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            gradient = self.gradients[name].float()
            size = gradient.square().mean().sqrt()
            along = (gradient / size.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-3, 3)
            yield name, weights[name] * self.scales[name] * 0.5 * (noise + along)

    def _weights(self, number: int) -> dict[str, float]:
        if number == 0:
            return dict.fromkeys(self.parameters, 1.0)
        even = dict.fromkeys(self.parameters, 1.0)
        shares = {name: abs(share) for name, share in self._predict(self._first_step(), number, even)[1].items()}
        alive = sorted(share for share in shares.values() if share)
        middle = alive[len(alive) // 2] if alive else 1.0
        signs = torch.randint(0, 2, (len(shares),), generator=torch.Generator().manual_seed(self.seed + number))
        return {
            name: (1.0 if sign else -1.0) * min(10.0, middle / share if share else 1.0)
            for (name, share), sign in zip(shares.items(), signs.tolist(), strict=True)
        }

    def _shifted(self, name: str, direction: Tensor, step: float) -> Tensor:
        base = self.base[name]
        # rounded to the parameter's type: the prediction uses the steps really taken
        wide = base.double() if base.dtype == torch.float64 else base.float()
        return (wide + step * direction.to(wide.dtype)).to(base.dtype)

    def _predict(self, step: float, number: int, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        shares = {}
        for name, direction in self._direction(number, weights):
            plus, minus = self._shifted(name, direction, step), self._shifted(name, direction, -step)
            product = self.gradients[name].to(torch.float64) * (plus.to(torch.float64) - minus.to(torch.float64))
            shares[name] = product.sum().item() / (2 * step)
        return sum(shares.values()), shares

    def _loss_at(self, step: float, number: int, weights: Mapping[str, float]) -> float:
        for name, direction in self._direction(number, weights):
            self.parameters[name].data.copy_(self._shifted(name, direction, step))
        try:
            return self.evaluate()
        finally:
            self.restore()

    def _estimate(
        self, step: float, number: int, weights: Mapping[str, float], scale: float, floor: float
    ) -> tuple[Estimate, float]:
        """Richardson's estimate of the deviation from the steps h and h/2, and autograd's derivative."""
        deviations = []
        for h in (step, step / 2):
            measured = (self._loss_at(h, number, weights) - self._loss_at(-h, number, weights)) / (2 * h)
            slope = self._predict(h, number, weights)[0]
            deviations.append((measured - slope) / scale)
        wide, narrow = deviations
        if not math.isfinite(wide) or not math.isfinite(narrow):
            return Estimate(step, math.inf, math.inf), slope
        # rounding of four losses, weighted as the estimate weighs them
        rounding = floor / (step * scale)
        return Estimate(step, (4 * narrow - wide) / 3, abs(wide - narrow) / 3 + rounding), slope

    def _is_kink(
        self, estimate: Estimate, number: int, weights: Mapping[str, float], loss: float, scale: float
    ) -> bool:
        """Whether the slopes to both sides differ however small the step, with autograd's value between them."""
        gaps = []
        for h in (estimate.step, estimate.step / 4):
            slope = self._predict(h, number, weights)[0]
            right = (self._loss_at(h, number, weights) - loss) / h
            left = (loss - self._loss_at(-h, number, weights)) / h
            margin = self.tolerance * scale
            if not min(left, right) - margin <= slope <= max(left, right) + margin:
                return False
            gaps.append(abs(right - left))
        # a smooth bend would have shrunk to a quarter
        return gaps[1] > 0.6 * gaps[0]


def scales_of(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each parameter; a tenth of the median of the others for one that is zero."""
    sizes = {name: p.data.float().square().mean().sqrt().item() if p.numel() else 0.0 for name, p in parameters.items()}
    alive = sorted(size for size in sizes.values() if size)
    spare = 0.1 * alive[len(alive) // 2] if alive else 0.01
    return {name: size or spare for name, size in sizes.items()}
