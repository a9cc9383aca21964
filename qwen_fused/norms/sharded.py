"""Gradients that are DTensors: each rank measures what it holds; one collective per mesh dimension does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(grads: Sequence[Tensor]) -> DeviceMesh | None:
    """The mesh that the DTensors among the gradients share; None when all are plain tensors."""
    # a look at the types alone: this runs at every step, over thousands of tensors
    if set(map(type, grads)) <= {Tensor}:
        return None
    from torch.distributed.tensor import DTensor

    meshes = {grad.device_mesh for grad in grads if isinstance(grad, DTensor)}
    if len(meshes) > 1:
        raise ValueError(f"sharded gradients must share one device mesh, got {sorted(map(str, meshes))}")
    return meshes.pop() if meshes else None


def local(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parts of the gradients that this rank holds, sharing memory with them."""
    if mesh_of(grads) is None:
        return grads
    return [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]


def count_write(grads: Sequence[Tensor]) -> None:
    """Tell autograd that the DTensors were written to: it was their local parts that it saw change."""
    if mesh_of(grads) is not None:
        torch.autograd.graph.increment_version([grad for grad in grads if hasattr(grad, "to_local")])


def _counts_here(grad: Tensor, coordinate: Sequence[int]) -> bool:
    """Whether this rank answers for its part: of copies along a mesh dimension, only the first does."""
    if not hasattr(grad, "placements"):
        return not any(coordinate)
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(f"sharded gradients must be reduced before they are measured, got {grad.placements}")
    return not any(place for place, kind in zip(coordinate, grad.placements, strict=True) if kind.is_replicate())


def local_share(
    grads: Sequence[Tensor], rows: Sequence[int], position: Sequence[int], mesh: DeviceMesh
) -> tuple[list[Tensor], list[int], list[int]]:
    """The local parts that this rank answers for, with rows and positions to match (see csrc/ops.cpp)."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank must be part of the gradients' device mesh, got {mesh}")
    mine = [_counts_here(grad, coordinate) for grad in grads]
    before = [0]
    for here in mine:
        before.append(before[-1] + here)
    places = position or range(len(grads))
    shifted = [n if i % 3 == 2 else before[n] for i, n in enumerate(rows)]
    parts = local([grad for grad, here in zip(grads, mine, strict=True) if here])
    return list(parts), shifted, [place for place, here in zip(places, mine, strict=True) if here]


def combine(values: Tensor, counts: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The statistics of all ranks together, the same bits on every rank.

    An all-gather and not an all-reduce: it brings sum, maximum and first index in one collective, and the order of the
    sum does not depend on the network.

    Args:
        values: [3, R] norm, max_abs, inv_scale of this rank's share.
        counts: [2, R] nonfinite, first_nonfinite.
    """
    packed = torch.cat([values[:2].double(), counts.double()])
    for dim in range(mesh.ndim):
        ranks = mesh.size(dim)
        gathered = packed.new_empty(ranks, *packed.shape)
        # by list: the collective into one tensor changes its name between torch 2.10 and 2.14
        torch.distributed.all_gather([*gathered.unbind()], packed, group=mesh.get_group(dim))
        norms, maxima, nonfinite, first = gathered.unbind(1)
        largest = norms.amax(0)
        scale = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        none = first < 0
        first = torch.where(none, torch.inf, first).amin(0)
        packed = torch.stack(
            [
                scale * (norms / scale).square().sum(0).sqrt(),
                maxima.amax(0),
                nonfinite.sum(0),
                torch.where(none.all(0), -1.0, first),
            ]
        )
    return torch.cat([packed[:2].to(values.dtype), values[2:]]), packed[2:].long()
