"""Numbers that change from call to call under torch.compile: at most two compilations, whatever their schedule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from efe_cases import ALL_TERMS, make_case, run, with_grad

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import efe_loss

NUMBERS = ("hard_floor", "ce", "risk", "ambiguity", "agreement", "anchor", "prompt")
# the mode is about the floor; a weight is compiled alike in both
SCHEDULES = [("hard_floor", "episode"), *zip(NUMBERS, ["cell", "episode"] * 4, strict=False)]


def changed(name: str, value: float) -> dict:
    """Options of `efe_loss` with one number at that value."""
    if name == "hard_floor":
        return {"hard_floor": value, "weights": ALL_TERMS}
    return {"hard_floor": 0.3, "weights": dataclasses.replace(ALL_TERMS, **{name: value})}


@pytest.mark.parametrize(("name", "hard_mode"), SCHEDULES)
def test_two_compilations_for_any_schedule(fused, name, hard_mode):
    """Four values, three where Triton is interpreted, which takes its time; each with its own gradients."""
    case, compilations = make_case(B=1, T=2, C=3, H=2, W=2, dtype=torch.float32), []
    steps = (1, 2, 3) if (fused["backend"], fused["device"]) == ("triton", "cpu") else (1, 2, 3, 10)

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda value, case: (
            efe_loss(**case, **changed(name, value), hard_mode=hard_mode, backend=fused["backend"]).loss
        ),
        fullgraph=True,
        backend=backend,
    )
    for step in steps:
        value = step / 20
        leaves = with_grad(case, fused["device"])
        compiled(value, leaves).backward()
        expected = with_grad(case, fused["device"])
        run(expected, **changed(name, value), hard_mode=hard_mode, backend=fused["backend"])
        for key, x in expected.items():
            if x.grad is not None:
                torch.testing.assert_close(leaves[key].grad, x.grad, rtol=0, atol=0, msg=key)
    assert len(compilations) <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_annealed_through_the_compiler(inner):
    """Past the front of torch.compile, which is all that a counting backend sees."""
    case = make_case(T=2, H=2, dtype=torch.float32)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(
        lambda floor, weight, case: (
            efe_loss(**case, hard_floor=floor, weights=dataclasses.replace(ALL_TERMS, risk=weight)).loss
        ),
        fullgraph=True,
        backend=inner,
    )
    # the seventh weight is 1
    for step in (1, 2, 7, 10):
        leaves, expected = with_grad(case), with_grad(case)
        loss = compiled(step / 20, step / 7, leaves)
        loss.backward()
        out, grads = run(expected, hard_floor=step / 20, weights=dataclasses.replace(ALL_TERMS, risk=step / 7))
        torch.testing.assert_close(loss, out.loss, rtol=0, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(leaves[name].grad, grad, rtol=0, atol=0, msg=name)
    assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_the_cross_entropy_alone():
    logits, target, compilations = torch.randn(8, 4), torch.randint(0, 4, (8,)), []
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda floor: hard_cell_cross_entropy(logits, target, hard_floor=floor).loss,
        fullgraph=True,
        backend=lambda graph, inputs: (compilations.append(graph), graph.forward)[1],
    )
    for step in range(1, 13):
        found, expected = compiled(step / 20), hard_cell_cross_entropy(logits, target, hard_floor=step / 20).loss
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(compilations) <= 2
    torch._dynamo.reset()
