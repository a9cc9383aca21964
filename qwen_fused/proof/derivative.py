"""Compare autograd's directional derivative <g, v> with the loss itself, moved a little along v and back.

    D(h) = (L(p + h v) - L(p - h v)) / 2h = <g, v> + O(h^2)

The loss is evaluated in float64 where the code allows it, whatever type autograd computed in; there one step that
agrees settles it. Otherwise two steps give Richardson's estimate (4 D(h/2) - D(h)) / 3 and, from their disagreement,
its error; the loss's rounding adds to that error. A direction is judged only where the error is small against the
gradient's own scale, so that neither a coarse data type nor a kink (ReLU) raises a false alarm: what does not settle
as h changes is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# relative deviation that counts as agreement, by the type that autograd computed in
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# largest relative error at which a direction is judged at all
JUDGED_BELOW = 0.1
# by the type of the evaluations: smallest and largest step, relative to the parameters' size, and the relative change
# of the loss to aim at, near the cube root of its precision, where rounding and bending are alike
STEPS = {torch.float64: (1e-7, 1e-2, 6e-6), torch.float32: (1e-4, 3e-1, 2.5e-3), torch.bfloat16: (1e-2, 3e-1, 5e-2)}


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
        evaluate: the loss as a float, the same function at each call; given the parameters' values by id, in the type
            to compute in, or None to compute as the parameters themselves say.
        coarse: coarsest type that autograd computed in.
        wide: type to evaluate in, or None for the parameters' own.
        seed: for the directions.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        evaluate: Callable[[Mapping[int, Tensor] | None], float],
        coarse: torch.dtype,
        wide: torch.dtype | None,
        seed: int,
    ):
        self.parameters = {name: p for name, p in parameters.items() if name in gradients}
        self.gradients = gradients
        self.evaluate = evaluate
        self.wide = wide
        self.seed = seed
        self.base = {name: p.data.clone() for name, p in self.parameters.items()}
        self.scales = scales_of(self.parameters)
        self._here: float | None = None
        self.tolerance = TOLERANCE.get(coarse, TOLERANCE[torch.bfloat16])
        fine = wide or coarse
        self.first, self.last, self.target = STEPS.get(fine, STEPS[torch.bfloat16])
        # what the loss is rounded to, with a margin for the operations before it; 16-bit rounding averages out in part
        self.noise = 4 * torch.finfo(fine).eps if fine in STEPS and fine != torch.bfloat16 else 2e-4

    def check(self, number: int, nondeterminism: float = 0.0, only: Collection[str] = ()) -> Verdict:
        """Judge one direction.

        Args:
            number: which direction; the first has every parameter's gradient with its own sign.
            nondeterminism: by how much the loss differs between two evaluations at the same point.
            only: names of the parameters to move, all when empty.
        """
        weights = self._weights(number, only or self.parameters.keys())
        shares = self._predict(self.last / 10, number, weights)[1]
        scale = math.sqrt(sum(share * share for share in shares.values()))
        loss = self.here()
        if not math.isfinite(loss) or not math.isfinite(scale):
            return Verdict(None, math.nan, math.nan, math.nan, reason="the loss or its gradient is not finite")
        if scale == 0:
            return Verdict(None, math.nan, math.nan, math.nan, reason="the gradient is zero")
        floor = self.noise * abs(loss) + nondeterminism
        first = min(max(self.target * abs(loss) / scale, self.first), self.last)
        shares = {name: share / scale for name, share in shares.items()}
        deviation, slope = self._deviation(first, number, weights, scale)
        rounding = floor / (first * scale)
        if abs(deviation) <= self.tolerance and rounding <= self.tolerance:
            # two ways to the same number: no error estimate can make that plainer
            return Verdict(True, deviation, self.tolerance + rounding, 1 + deviation * scale / slope, shares)
        estimates: list[Estimate] = []
        for start in (first, first / 8, min(4 * first, 2 * self.last), first / 64):
            estimates.append(self._estimate(start, number, weights, scale, floor))
            good = min(estimates, key=lambda e: e.error)
            resolution = self.tolerance + 3 * good.error
            if abs(good.deviation) <= resolution and 3 * good.error <= 0.05:
                break
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

    def wrong_among(self, groups: Mapping[str, list[str]]) -> list[str]:
        """Names of the groups of parameters whose own derivative deviates, each group judged alone."""
        return [group for group, names in groups.items() if self._is_wrong(names)]

    def _is_wrong(self, names: Collection[str]) -> bool:
        weights = self._weights(1, names)
        shares = self._predict(self.last / 10, 1, weights)[1]
        scale = math.sqrt(sum(share * share for share in shares.values()))
        if not scale:
            return False
        step = min(max(self.target * abs(self.here()) / scale, self.first), self.last)
        return abs(self._deviation(step, 1, weights, scale)[0]) > 2 * self.tolerance

    def _settled(self, estimates: list[Estimate]) -> bool:
        """Whether different steps agree on the deviation: noise and jumps don't."""
        usable = sorted((e for e in estimates if e.error <= JUDGED_BELOW), key=lambda e: e.error)[:2]
        if len(usable) < 2 or any(abs(e.deviation) <= self.tolerance + 3 * e.error for e in usable):
            return False
        one, other = (e.deviation for e in usable)
        return abs(one - other) <= 0.3 * max(abs(one), abs(other))

    def here(self) -> float:
        """The loss at the point itself."""
        if self._here is None:
            self._here = self._loss_at(0.0, 0, dict.fromkeys(self.parameters, 0.0))
        return self._here

    def restore(self) -> None:
        """Put the parameters back to the point where they were."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.base[name])

    def _direction(self, number: int, weights: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        for place, (name, parameter) in enumerate(self.parameters.items()):
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(self.seed * 7919 + number * 104729 + place)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            gradient = self.gradients[name].float()
            size = gradient.square().mean().sqrt()
            along = (gradient / size.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-3, 3)
            yield name, weights[name] * self.scales[name] * 0.5 * (noise + along)

    def _weights(self, number: int, names: Collection[str]) -> dict[str, float]:
        even = {name: float(name in names) for name in self.parameters}
        if number == 0:
            return even
        shares = {name: abs(share) for name, share in self._predict(self.last / 10, number, even)[1].items()}
        alive = sorted(share for share in shares.values() if share)
        middle = alive[len(alive) // 2] if alive else 1.0
        # in float64 the steps are so small that a parameter may take part a thousandfold
        most = 1e3 if self.wide == torch.float64 else 10.0
        generator = torch.Generator().manual_seed(self.seed + number)
        # signs, and sizes that differ: equal shares of both signs would cancel
        signs = torch.randint(0, 2, (len(shares),), generator=generator) * 2 - 1
        sizes = 0.5 + torch.rand(len(shares), generator=generator)
        return {
            name: even[name] * factor * min(most, middle / share if share else 1.0)
            for (name, share), factor in zip(shares.items(), (signs * sizes).tolist(), strict=True)
        }

    def _shifted(self, name: str, direction: Tensor, step: float) -> Tensor:
        base = self.base[name]
        exact = base.to(self.wide or (base.dtype if base.dtype == torch.float64 else torch.float32))
        exact = exact + step * direction.to(exact.dtype)
        # rounded to the parameter's own type: the prediction uses the steps really taken
        return exact if self.wide else exact.to(base.dtype)

    def _predict(self, step: float, number: int, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        shares = {}
        for name, direction in self._direction(number, weights):
            plus, minus = self._shifted(name, direction, step), self._shifted(name, direction, -step)
            product = self.gradients[name].to(torch.float64) * (plus.to(torch.float64) - minus.to(torch.float64))
            shares[name] = product.sum().item() / (2 * step)
        return sum(shares.values()), shares

    def _values(self, step: float, number: int, weights: Mapping[str, float]) -> Mapping[int, Tensor] | None:
        """Move the parameters, and give their exact values where those are computed with."""
        values = {}
        for name, direction in self._direction(number, weights):
            values[id(self.parameters[name])] = self._shifted(name, direction, step)
            # code that no mode sees reads the parameters themselves
            self.parameters[name].data.copy_(values[id(self.parameters[name])])
        return values if self.wide else None

    def _loss_at(self, step: float, number: int, weights: Mapping[str, float]) -> float:
        try:
            return self.evaluate(self._values(step, number, weights))
        finally:
            self.restore()

    def _deviation(self, step: float, number: int, weights: Mapping[str, float], scale: float) -> tuple[float, float]:
        """Measured minus autograd's derivative at one step, relative to the scale, and autograd's derivative."""
        measured = (self._loss_at(step, number, weights) - self._loss_at(-step, number, weights)) / (2 * step)
        slope = self._predict(step, number, weights)[0]
        return (measured - slope) / scale, slope

    def _estimate(self, step: float, number: int, weights: Mapping[str, float], scale: float, floor: float) -> Estimate:
        """Richardson's estimate of the deviation from the steps h and h/2."""
        wide, narrow = (self._deviation(h, number, weights, scale)[0] for h in (step, step / 2))
        if not math.isfinite(wide) or not math.isfinite(narrow):
            return Estimate(step, math.inf, math.inf)
        # rounding of four losses, weighted as the estimate weighs them
        rounding = floor / (step * scale)
        return Estimate(step, (4 * narrow - wide) / 3, abs(wide - narrow) / 3 + rounding)

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
