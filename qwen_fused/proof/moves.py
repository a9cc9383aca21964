"""Put parameters at base + step * direction, in their own type or in a wider one, and ask for the loss there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qwen_fused.proof.real_parts import real_parts

# prime, so that the rows of no matrix repeat each other
NOISE_BLOCK = 65537
# elements that are widened at a time, which the cache holds
WIDENED = 1 << 16


class Moves:
    """Parameters that are moved along directions and put back.

    Args:
        parameters: name -> parameter, where they are to come back to.
        evaluate: the loss as a float, the same function at each call; given the parameters' values in the type to
            compute in, or None to compute as the parameters themselves say.
        wide: type to evaluate in, or None for the parameters' own.
        base: name -> value to move from; a copy of the parameters when None.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        evaluate: Callable[[Mapping[int, ExactValue] | None], float],
        wide: torch.dtype | None,
        base: Mapping[str, Tensor] | None = None,
    ):
        self.parameters = parameters
        self.evaluate = evaluate
        self.wide = wide
        self._moved: set[str] = set()
        self.base = {name: p.data.clone() for name, p in parameters.items()} if base is None else base

    def shifted(self, name: str, direction: Tensor, step: float) -> Tensor:
        """A parameter's value, `step` along the direction."""
        return ExactValue(self.base[name], direction, step, self.wide)()

    def loss_at(self, step: float, directions: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
        """The loss with every parameter moved by step * weight along its direction; they are left there."""
        values = {}
        for name, parameter in self.parameters.items():
            far = step * weights.get(name, 0.0) if name in directions else 0.0
            exact = ExactValue(self.base[name], directions.get(name), far, self.wide)
            values[id(parameter)] = exact
            if far or name in self._moved:
                # code that no mode sees reads the parameters themselves
                exact.write_to(parameter)
            (self._moved.add if far else self._moved.discard)(name)
        return self.evaluate(values if self.wide else None)

    def restore(self) -> None:
        """Put the parameters back to where they were."""
        for name in self._moved:
            self.parameters[name].data.copy_(self.base[name])
        self._moved.clear()


class ExactValue:
    """A parameter's value at base + far * direction, in the type that is computed in, made when it is asked for.

    Args:
        base: where it is moved from.
        direction: of the same shape, None where it is not moved.
        far: how far along it.
        wide: the type; None for the base's own, to which the sum is rounded.
    """

    def __init__(self, base: Tensor, direction: Tensor | None, far: float, wide: torch.dtype | None):
        self.base = base
        self._direction = direction if far else None
        self._far = far
        self._wide = wide

    def __call__(self) -> Tensor:
        return self._sum(self.base, self._direction)

    def rows(self, index: Tensor) -> Tensor:
        """Those rows alone: of a large table a few are looked up."""
        return self._sum(self.base[index], None if self._direction is None else self._direction[index])

    def _sum(self, base: Tensor, direction: Tensor | None) -> Tensor:
        parts = real_parts(base)
        if direction is None:
            exact = parts if self._wide is None else parts.to(self._wide)
        else:
            # in float32 at least, whatever the result is rounded to
            wide = self._wide or torch.promote_types(parts.dtype, torch.float32)
            exact = _add(parts, real_parts(direction), self._far, wide)
        exact = torch.view_as_complex(exact) if base.is_complex() else exact
        return exact if self._wide else exact.to(base.dtype)

    def write_to(self, parameter: Tensor) -> None:
        """Give the parameter itself this value, rounded to its own type."""
        if self._direction is None:
            parameter.data.copy_(self.base)
        elif parameter.dtype == self._direction.dtype == self.base.dtype:
            torch.add(self.base, self._direction, alpha=self._far, out=parameter.data)
        else:
            parameter.data.copy_(self())


def _add(base: Tensor, direction: Tensor, far: float, dtype: torch.dtype) -> Tensor:
    """base + far * direction, computed in a type."""
    if dtype == direction.dtype or not (base.is_contiguous() and direction.is_contiguous()):
        return base.to(dtype, copy=True).add_(direction, alpha=far)
    # block by block: torch adds two types half as fast, and a wide copy of the direction is a copy too many
    exact = torch.empty_like(base, dtype=dtype)
    blocks = (tensor.view(-1).split(WIDENED) for tensor in (exact, base, direction))
    for to, start, along in zip(*blocks, strict=True):
        to.copy_(start).add_(along.to(dtype), alpha=far)
    return exact


# id of a parameter -> its exact value: a model's worth of them at once would be a copy too many
Values = Mapping[int, ExactValue]


class Noise:
    """Normal noise of any shape: one block of it, begun at another place for each tensor and repeated."""

    def __init__(self, seed: int):
        block = torch.randn(NOISE_BLOCK, generator=torch.Generator().manual_seed(seed))
        self._block = torch.cat([block, block])
        self._generator = torch.Generator().manual_seed(seed + 1)

    def add_to(self, tensor: Tensor, factor: float = 1.0) -> None:
        """Add the factor times noise, rounded to the tensor's type, to a tensor's real parts."""
        parts = real_parts(tensor)
        count = parts.numel()
        start = int(torch.randint(0, NOISE_BLOCK, (), generator=self._generator))
        block = self._block[start : start + min(count, NOISE_BLOCK)].mul(factor).to(parts.device, parts.dtype)
        if not parts.is_contiguous():
            parts.add_(block.repeat(-(-count // NOISE_BLOCK))[:count].reshape(parts.shape))
            return
        # the block as it is, row by row: a tensor's worth of its copies is slow to fill and a copy too many
        flat, whole = parts.view(-1), count // NOISE_BLOCK * NOISE_BLOCK
        if whole:
            flat[:whole].view(-1, NOISE_BLOCK).add_(block)
        flat[whole:].add_(block[: count - whole])


def scales_of(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each parameter; a tenth of the median of the others for one that is zero."""
    sizes = {name: _root_mean_square(p) for name, p in parameters.items()}
    alive = sorted(size for size in sizes.values() if size)
    spare = 0.1 * alive[len(alive) // 2] if alive else 0.01
    return {name: size or spare for name, size in sizes.items()}


def _root_mean_square(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    parts = real_parts(tensor.detach())
    wide = torch.float64 if parts.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(parts, dtype=None if parts.dtype == wide else wide)) / parts.numel() ** 0.5


def has_nonzero(tensor: Tensor) -> bool:
    """Whether any element is not zero; most often the first few tell."""
    return bool(tensor.reshape(-1)[:64].any()) or bool(tensor.any()) if tensor.is_contiguous() else bool(tensor.any())
