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
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from qwen_fused.proof.moves import Moves, Noise, Values, scales_of
from qwen_fused.proof.real_parts import inner, real_parts
from qwen_fused.proof.verdict import Estimate, Verdict

# relative deviation that counts as agreement, by the type that autograd computed in
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# largest relative error at which a direction is judged at all
JUDGED_BELOW = 0.1
# how many times its rounding the loss must move where the gradient is zero, for the zero to be wrong
ZERO_MOVES = 1e3
# by the type of the evaluations: smallest and largest step, relative to the parameters' size, and the relative change
# of the loss to aim at, near the cube root of its precision, where rounding and bending are alike
STEPS = {torch.float64: (1e-7, 1e-2, 6e-6), torch.float32: (1e-4, 3e-1, 2.5e-3), torch.bfloat16: (1e-2, 3e-1, 5e-2)}


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
        base: name -> value of the parameter there; a copy of them is made when None.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        evaluate: Callable[[Values | None], float],
        coarse: torch.dtype,
        wide: torch.dtype | None,
        seed: int,
        base: Mapping[str, Tensor] | None = None,
    ):
        self.parameters = {name: p for name, p in parameters.items() if name in gradients}
        self.gradients = gradients
        self.wide = wide
        self.seed = seed
        # what is not judged stays where it is, and is computed with all the same
        stands = (
            {n: p.data.clone() if n in gradients else p.data for n, p in parameters.items()} if base is None else base
        )
        self.moves = Moves(parameters, evaluate, wide, stands)
        self.scales = scales_of(self.parameters)
        self._number: int | None = None
        self._along: dict[str, Tensor] = {}
        self._sizes: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._here: float | None = None
        # a step along the first direction and the loss at both its ends, whose mean `_here` is meanwhile
        self._ends: tuple[float, tuple[float, float]] | None = None
        self.tolerance = TOLERANCE.get(coarse, TOLERANCE[torch.bfloat16])
        self.is_fine = coarse in (torch.float32, torch.float64)
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
        try:
            return self._check(number, nondeterminism, only)
        finally:
            self.restore()

    def _check(self, number: int, nondeterminism: float, only: Collection[str]) -> Verdict:
        weights = self._weights(number, only or self.parameters.keys())
        shares = self._predict(self.last / 10, weights)[1]
        scale = math.sqrt(sum(share * share for share in shares.values()))
        loss = self.here()
        if not math.isfinite(loss) or not math.isfinite(scale):
            return Verdict(None, math.nan, math.nan, math.nan, reason="the loss or its gradient is not finite")
        if scale == 0:
            return Verdict(None, math.nan, math.nan, math.nan, reason="the gradient is zero")
        floor = self.noise * abs(loss) + nondeterminism
        first, ends = self._first_step(loss, scale), None
        if self._ends is not None and number == 0 and not only:
            first, ends = self._ends
        shares = {name: share / scale for name, share in shares.items()}
        rounding = floor / (first * scale)
        if self._ends is not None and ends is None:
            # one side is enough where it agrees: the loss in between is known from the first direction
            plus, slope = self._loss_at(first, weights), sum(shares.values()) * scale
            deviation = ((plus - loss) / first - slope) / scale
            if abs(deviation) <= self.tolerance and 2 * rounding <= self.tolerance:
                return Verdict(True, deviation, self.tolerance + 2 * rounding, 1 + deviation * scale / slope, shares)
            ends = plus, self._loss_at(-first, weights)
        deviation, slope = self._deviation(first, weights, scale, ends)
        if abs(deviation) <= self.tolerance and rounding <= self.tolerance:
            # two ways to the same number: no error estimate can make that plainer
            return Verdict(True, deviation, self.tolerance + rounding, 1 + deviation * scale / slope, shares)
        if self._ends is not None:
            loss = self.here(exactly=True)
        estimates: list[Estimate] = []
        for start in (first, first / 8, min(4 * first, 2 * self.last), first / 64):
            estimates.append(self._estimate(start, weights, scale, floor))
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
            verdict.ok = self._is_kink(good, weights, loss, scale)
            verdict.reason = "a kink: autograd's value lies between the slopes to both sides" if verdict.ok else ""
        return verdict

    def wrong_among(self, groups: Mapping[str, list[str]]) -> list[str]:
        """Names of the groups of parameters whose own derivative deviates, each group judged alone."""
        return [group for group, names in groups.items() if self._is_wrong(names)]

    def _is_wrong(self, names: Collection[str]) -> bool:
        weights = self._weights(1, names)
        shares = self._predict(self.last / 10, weights)[1]
        scale = math.sqrt(sum(share * share for share in shares.values()))
        if not scale:
            # a gradient of zero is right only where the loss does not move
            far = self.last / 10
            change = abs(self._loss_at(far, weights) - self._loss_at(-far, weights))
            return change > ZERO_MOVES * self.noise * abs(self.here())
        step = self._first_step(self.here(), scale)
        return abs(self._deviation(step, weights, scale)[0]) > 2 * self.tolerance

    def _settled(self, estimates: list[Estimate]) -> bool:
        """Whether different steps agree on the deviation: noise and jumps don't."""
        usable = sorted((e for e in estimates if e.error <= JUDGED_BELOW), key=lambda e: e.error)[:2]
        if len(usable) < 2 or any(abs(e.deviation) <= self.tolerance + 3 * e.error for e in usable):
            return False
        one, other = (e.deviation for e in usable)
        return abs(one - other) <= 0.3 * max(abs(one), abs(other))

    def here(self, exactly: bool = False) -> float:
        """The loss at the point itself; once `between` was asked its mean, unless it is wanted exactly."""
        if self._here is None or (exactly and self._ends is not None):
            self._here, self._ends = self.moves.loss_at(0.0, {}, {}), None
        return self._here

    def between(self, loss: float) -> float:
        """About the loss at the point: the mean of the two that `check` needs for the first direction anyway.

        Args:
            loss: about what it is.
        """
        weights = self._weights(0, self.parameters.keys())
        scale = math.sqrt(sum(share * share for share in self._predict(self.last / 10, weights)[1].values()))
        if not scale or not math.isfinite(scale):
            return self.here()
        step = self._first_step(loss, scale)
        ends = self._loss_at(step, weights), self._loss_at(-step, weights)
        self._here, self._ends = sum(ends) / 2, (step, ends)
        return self._here

    def restore(self) -> None:
        """Put the parameters back to the point where they were."""
        self.moves.restore()

    def _use(self, number: int) -> None:
        """Make a direction, once, and each parameter's share of the slope along it."""
        if number == self._number:
            return
        self._number = number
        noise = Noise(self.seed * 7919 + number)
        for name in self.parameters:
            parts, size = real_parts(self.gradients[name]), 0.5 * self.scales[name]
            if name not in self._along:
                self._along[name] = torch.empty(parts.shape, dtype=torch.float32, device=parts.device)
            # over the direction before it, which nobody needs any more
            self._begin(name, self._along[name], parts, size)
            noise.add_to(self._along[name], size)
        self._shares = {name: inner(self.gradients[name], along) for name, along in self._along.items()}

    def _begin(self, name: str, along: Tensor, gradient: Tensor, size: float) -> None:
        """What noise is added to: the gradient at the size asked for, what stands out of it cut off."""
        if name not in self._sizes:
            self._sizes[name] = _size_of(gradient)
        factor = size / self._sizes[name] if self._sizes[name] else 0.0
        if gradient.dtype == along.dtype:
            torch.mul(gradient, factor, out=along)
        else:
            along.copy_(gradient).mul_(factor)
        along.clamp_(-3 * size, 3 * size)

    def _weights(self, number: int, names: Collection[str]) -> dict[str, float]:
        self._use(number)
        even = {name: float(name in names) for name in self.parameters}
        if number == 0:
            return even
        shares = {name: abs(share) * even[name] for name, share in self._shares.items()}
        alive = sorted(share for share in shares.values() if share)
        middle = alive[len(alive) // 2] if alive else 1.0
        # in float64 the steps are so small that a parameter may take part a thousandfold: not with a gradient that 16
        # bits have rounded, of which a bias before a normalisation has nothing else
        most = 1e3 if self.wide == torch.float64 and self.is_fine else 10.0
        generator = torch.Generator().manual_seed(self.seed + number)
        # signs, and sizes that differ: equal shares of both signs would cancel
        signs = torch.randint(0, 2, (len(shares),), generator=generator) * 2 - 1
        sizes = 0.5 + torch.rand(len(shares), generator=generator)
        return {
            name: even[name] * factor * min(most, middle / share if share else 1.0)
            for (name, share), factor in zip(shares.items(), (signs * sizes).tolist(), strict=True)
        }

    def _predict(self, step: float, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Autograd's slope along the direction, and each parameter's share of it."""
        if self.wide:
            shares = {name: weights[name] * share for name, share in self._shares.items()}
            return sum(shares.values()), shares
        shares = {}
        for name, along in self._along.items():
            # rounded to the parameter's own type: the steps really taken
            plus, minus = (self.moves.shifted(name, along, sign * step * weights[name]) for sign in (1, -1))
            shares[name] = inner(self.gradients[name], plus.to(torch.promote_types(plus.dtype, torch.float64)) - minus)
            shares[name] /= 2 * step
        return sum(shares.values()), shares

    def _loss_at(self, step: float, weights: Mapping[str, float]) -> float:
        return self.moves.loss_at(step, self._along, weights)

    def _first_step(self, loss: float, scale: float) -> float:
        return min(max(self.target * abs(loss) / scale, self.first), self.last)

    def _deviation(
        self, step: float, weights: Mapping[str, float], scale: float, ends: tuple[float, float] | None = None
    ) -> tuple[float, float]:
        """Measured minus autograd's derivative at one step, relative to the scale, and autograd's derivative."""
        plus, minus = ends or (self._loss_at(step, weights), self._loss_at(-step, weights))
        measured = (plus - minus) / (2 * step)
        slope = self._predict(step, weights)[0]
        return (measured - slope) / scale, slope

    def _estimate(self, step: float, weights: Mapping[str, float], scale: float, floor: float) -> Estimate:
        """Richardson's estimate of the deviation from the steps h and h/2."""
        wide, narrow = (self._deviation(h, weights, scale)[0] for h in (step, step / 2))
        if not math.isfinite(wide) or not math.isfinite(narrow):
            return Estimate(step, math.inf, math.inf)
        # rounding of four losses, weighted as the estimate weighs them
        rounding = floor / (step * scale)
        return Estimate(step, (4 * narrow - wide) / 3, abs(wide - narrow) / 3 + rounding)

    def _is_kink(self, estimate: Estimate, weights: Mapping[str, float], loss: float, scale: float) -> bool:
        """Whether the slopes to both sides differ however small the step, with autograd's value between them."""
        gaps = []
        for h in (estimate.step, estimate.step / 4):
            slope = self._predict(h, weights)[0]
            right = (self._loss_at(h, weights) - loss) / h
            left = (loss - self._loss_at(-h, weights)) / h
            margin = self.tolerance * scale
            if not min(left, right) - margin <= slope <= max(left, right) + margin:
                return False
            gaps.append(abs(right - left))
        # a smooth bend would have shrunk to a quarter
        return gaps[1] > 0.6 * gaps[0]


def _size_of(tensor: Tensor) -> float:
    wide = None if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    return float(torch.linalg.vector_norm(tensor, dtype=wide)) / max(1, tensor.numel()) ** 0.5
