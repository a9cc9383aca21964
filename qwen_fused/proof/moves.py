"""Put parameters at base + step * direction, in their own type or in a wider one, and ask for the loss there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qwen_fused.proof.real_parts import real_parts

# id of a parameter -> its exact value, made when it is used: a model's worth of them at once is a copy too many
Values = Mapping[int, Callable[[], Tensor]]
# prime, so that the rows of no matrix repeat each other
NOISE_BLOCK = 65537


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
        evaluate: Callable[[Values | None], float],
        wide: torch.dtype | None,
        base: Mapping[str, Tensor] | None = None,
    ):
        self.parameters = parameters
        self.evaluate = evaluate
        self.wide = wide
        self.base = {name: p.data.clone() for name, p in parameters.items()} if base is None else base

    def shifted(self, name: str, direction: Tensor, step: float) -> Tensor:
        """A parameter's value, `step` along the direction."""
        base = self.base[name]
        exact = real_parts(base)
        exact = exact.to(self.wide or (exact.dtype if exact.dtype == torch.float64 else torch.float32))
        # to the type that the base itself is rounded to, unless a wider one is computed in
        exact = exact + step * real_parts(direction).to(exact.dtype)
        exact = torch.view_as_complex(exact) if base.is_complex() else exact
        return exact if self.wide else exact.to(base.dtype)

    def loss_at(self, step: float, directions: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
        """The loss with every parameter moved by step * weight along its direction."""
        values: dict[int, Callable[[], Tensor]] = {}
        try:
            for name, parameter in self.parameters.items():
                far = step * weights.get(name, 0.0) if name in directions else 0.0
                exact = self._exact(name, directions.get(name), far)
                values[id(parameter)] = exact
                if far:
                    # code that no mode sees reads the parameters themselves
                    parameter.data.copy_(exact())
            return self.evaluate(values if self.wide else None)
        finally:
            self.restore()

    def _exact(self, name: str, direction: Tensor | None, far: float) -> Callable[[], Tensor]:
        if direction is None or not far:
            return lambda: self.base[name]
        return lambda: self.shifted(name, direction, far)

    def restore(self) -> None:
        """Put the parameters back to where they were."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.base[name])


class Noise:
    """Normal noise of any shape: one block of it, begun at another place for each tensor and repeated."""

    def __init__(self, seed: int):
        block = torch.randn(NOISE_BLOCK, generator=torch.Generator().manual_seed(seed))
        self._block = torch.cat([block, block])
        self._generator = torch.Generator().manual_seed(seed + 1)

    def like(self, tensor: Tensor) -> Tensor:
        """Noise in float32, of the shape of the tensor's real parts, on its device."""
        shape = real_parts(tensor).shape
        count = shape.numel()
        start = int(torch.randint(0, NOISE_BLOCK, (), generator=self._generator))
        block = self._block[start : start + NOISE_BLOCK]
        flat = block[:count] if count <= NOISE_BLOCK else block.repeat(-(-count // NOISE_BLOCK))[:count]
        return flat.reshape(shape).to(tensor.device)


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
    return float(torch.linalg.vector_norm(parts, dtype=wide)) / parts.numel() ** 0.5
