"""Sharded gradients: two processes measure and clip what one process would, with one collective per mesh dimension."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from two_processes import run_ranks, said

from qwen_fused.norms.group_grad_norm import GroupGradNorm

RANKS = 2
# rows over two ranks: even, uneven, one of them empty
SHAPES = [(4, 3), (3, 5), (1, 7), (6, 2)]


def full_gradients(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def on_mesh(gradients, mesh, placements) -> list[nn.Parameter]:
    from torch.distributed.tensor import distribute_tensor

    parameters = []
    for gradient, placement in zip(gradients, placements, strict=True):
        if placement is None:
            p = nn.Parameter(torch.zeros_like(gradient))
            p.grad = gradient.clone()
        else:
            p = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, placement))
            p.grad = distribute_tensor(gradient, mesh, placement)
        parameters.append(p)
    return parameters


def whole(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def measure_layout(mesh, placements, gradients, calls: list[int]) -> dict:
    parameters = on_mesh(gradients, mesh, placements)
    norms = GroupGradNorm({"a": parameters[:2], "b": parameters[2:]})
    calls[0] = 0
    stats = norms.measure(inv_scale=0.5)
    collectives = calls[0]
    versions = [p.grad._version for p in parameters]
    norms.clip_(stats, {"a": 0.25, "b": 1e6})
    # the local part that was written, and the DTensor around it
    written = all(p.grad._version > v for p, v in zip(parameters, versions, strict=True))
    return {
        "written": written,
        "values": stats.values,
        "counts": stats.counts,
        "report": stats.to_dict(),
        "clipped": [whole(p.grad) for p in parameters],
        "collectives": collectives,
    }


def fsdp(mesh) -> dict:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model, mesh=mesh)
    model(torch.ones(4, 6)).square().sum().backward()
    norms = GroupGradNorm({"model": model})
    stats = norms.measure()
    norms.clip_(stats, 1.0)
    return {"norm": stats.norm, "clipped": [whole(p.grad) for p in model.parameters()]}


def work(rank: int, folder: Path) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    gather, calls = torch.distributed.all_gather, [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        return gather(*args, **kwargs)

    torch.distributed.all_gather = counted
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    bad = full_gradients()
    bad[1][2, 4] = math.nan  # a row that the second rank holds
    bad[3][0, 0] = math.inf
    results = {
        "sharded": measure_layout(line, [[Shard(0)]] * 4, full_gradients(), calls),
        "mixed": measure_layout(line, [[Shard(0)], [Replicate()], None, [Shard(1)]], full_gradients(), calls),
        "hybrid": measure_layout(square, [[Replicate(), Shard(0)]] * 4, full_gradients(), calls),
        "bad": measure_layout(line, [[Shard(0)]] * 4, bad, calls),
        "huge": measure_layout(line, [[Shard(0)]] * 4, full_gradients(1e37), calls),
        "fsdp": fsdp(line),
    }
    p = nn.Parameter(on_mesh([torch.zeros(2, 2)], line, [[Replicate()]])[0].detach())
    p.grad = DTensor.from_local(torch.ones(2, 2), line, [Partial()])
    for name, members in (
        ("partial", [p]),
        (
            "two meshes",
            [
                *on_mesh([torch.ones(2)], line, [[Shard(0)]]),
                *on_mesh([torch.ones(2)], square, [[Replicate(), Shard(0)]]),
            ],
        ),
    ):
        try:
            GroupGradNorm({"p": members}).measure()
            results[name] = "accepted"
        except ValueError as error:
            results[name] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    codes = run_ranks(lambda rank: work(rank, folder), folder, RANKS)
    assert codes == [0] * RANKS, "".join(said(folder, rank) for rank in range(RANKS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def alone(gradients: list[torch.Tensor]) -> tuple:
    parameters = on_mesh(gradients, None, [None] * len(gradients))
    norms = GroupGradNorm({"a": parameters[:2], "b": parameters[2:]})
    stats = norms.measure(inv_scale=0.5)
    norms.clip_(stats, {"a": 0.25, "b": 1e6})
    return stats, [p.grad for p in parameters]


@pytest.mark.parametrize(("layout", "collectives"), [("sharded", 1), ("mixed", 1), ("hybrid", 2)])
def test_two_processes_find_what_one_does(results, layout: str, collectives: int) -> None:
    stats, clipped = alone(full_gradients())
    for found in results:
        torch.testing.assert_close(found[layout]["values"], stats.values, rtol=1e-6, atol=0)
        assert torch.equal(found[layout]["counts"], stats.counts)
        assert found[layout]["collectives"] == collectives and found[layout]["written"]
        for ours, theirs in zip(found[layout]["clipped"], clipped, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(results[0][layout]["values"], results[1][layout]["values"])


def test_bad_element_of_another_rank_is_named(results) -> None:
    for found in results:
        report = found["bad"]["report"]
        assert [report[group]["nonfinite"] for group in "ab"] == [1, 1]
        assert [report[group]["tensor"] for group in "ab"] == ["a[1]", "b[1]"]
        assert math.isnan(report["a"]["norm"]) and report["b"]["norm"] == math.inf


def test_large_norms_do_not_overflow_between_ranks(results) -> None:
    stats, _ = alone(full_gradients(1e37))
    assert stats.norm.isfinite().all()
    for found in results:
        torch.testing.assert_close(found["huge"]["values"], stats.values, rtol=1e-6, atol=0)


def test_fsdp(results) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model(torch.ones(4, 6)).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for found in results:
        torch.testing.assert_close(found["fsdp"]["norm"], norm[None])
        for ours, p in zip(found["fsdp"]["clipped"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad)


def test_refuses_what_has_no_one_norm(results) -> None:
    for found in results:
        assert "sharded gradients must be reduced before they are measured" in found["partial"]
        assert "sharded gradients must share one device mesh" in found["two meshes"]
