"""The losses in ways of torch that pass kernels by: hundreds of random calls, each against the reference in float64.

A call may be refused, in words; a number that comes back must be right. Forward-mode AD, torch.func and torch.compile
here, parameters and windows in test_ways_in_gradients.py. QWEN_FUSED_WAYS_IN=5000 makes a long run of it.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from efe_cases import DIFFERENTIABLE, assert_agrees, in_float64, make_case
from torch import Tensor
from torch.autograd import forward_ad

import qwen_fused as qf
from qwen_fused.kernels.reference import TERMS
from qwen_fused.loss.dispatch import COMPILED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMPILED, reason="the fused loss is not here")]
CALLS = int(os.environ.get("QWEN_FUSED_WAYS_IN", "500"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# triton's interpreter takes a second for a call, and has the same way in
EVERY = 25


class Call:
    """One random call: which loss, its inputs, and what of them moves."""

    def __init__(self, seed: int, dtypes=DTYPES) -> None:
        draw = random.Random(seed)
        self.draw = draw
        self.dtype = draw.choice(dtypes)
        self.backend = "triton" if seed % EVERY == 0 else "cpp"
        sizes = {name: draw.randint(1, most) for name, most in (("B", 3), ("T", 3), ("H", 4), ("W", 4))}
        case = make_case(
            **sizes, C=draw.randint(2, 6), dtype=self.dtype, ignored=draw.choice([0.0, 0.3, 1.0]), seed=seed,
            weighted=draw.random() < 0.5,
        )  # fmt: skip
        optional = [name for name in case if name not in ("plan_logits", "target")]
        for name in draw.sample(optional, draw.randint(0, len(optional))):
            del case[name]
        self.alone = draw.random() < 0.3
        if self.alone:
            case = {name: case[name] for name in case if name in ("plan_logits", "target", "class_weight")}
            case["plan_logits"] = case["plan_logits"][:, 0]
        self.case = case
        self.leaves = [name for name in DIFFERENTIABLE if name in case]
        self.options = {"hard_mode": draw.choice(["episode", "cell", "none"]), "hard_floor": draw.random()}
        self.weights = {name: draw.choice([0.0, 1.0, draw.random()]) for name in TERMS}

    def loss(self, backend: str, **moved: Tensor) -> Tensor:
        case = {**(in_float64(self.case) if backend == "reference" else self.case), **moved}
        if self.alone:
            logits = case.pop("plan_logits")
            return qf.hard_cell_cross_entropy(logits, backend=backend, **case, **self.options).loss
        return qf.efe_loss(**case, weights=qf.EFEWeights(**self.weights), backend=backend, **self.options).loss

    def function(self, backend: str, names: list[str]):
        return lambda *given: self.loss(backend, **dict(zip(names, given, strict=True)))

    def inputs(self, backend: str, names: list[str]) -> tuple[Tensor, ...]:
        case = in_float64(self.case) if backend == "reference" else self.case
        return tuple(case[name] for name in names)

    def compare(self, found, expected, what: str) -> None:
        found, expected = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, expected))
        for x, y in zip(found, expected, strict=True):
            # a sum of products of rounded gradients: as many roundings as the gradients have
            few = 8 * torch.finfo(self.dtype).eps * max(1.0, y.abs().max().item()) if y.numel() else 0.0
            assert_agrees(x.detach(), y.detach(), torch.float64 if x.dtype == torch.float64 else self.dtype, what, few)


def jvp_of(call: Call, backend: str, way: str, names: list[str], tangents: list[Tensor]) -> Tensor:
    """The tangent of the loss, by one of the ways that there are to ask for it."""
    inputs, function = call.inputs(backend, names), call.function(backend, names)
    moved = tuple(t.double() if backend == "reference" else t for t in tangents)
    if way == "func.jvp":
        return torch.func.jvp(function, inputs, moved)[1]
    if way == "linearize":
        return torch.func.linearize(function, *inputs)[1](*moved)
    if way == "jacfwd":
        rows = torch.func.jacfwd(function, argnums=tuple(range(len(names))))(*inputs)
        return sum((row.double() * t.double()).sum() for row, t in zip(rows, moved, strict=True))
    wants_grad, graph = way.endswith("leaf"), not way.startswith("no_grad")
    with forward_ad.dual_level(), torch.set_grad_enabled(graph):
        duals = [
            forward_ad.make_dual(x.detach().requires_grad_(wants_grad), t) for x, t in zip(inputs, moved, strict=True)
        ]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    # torch's word for 0, which is right where no term reads what moves; the other side then says 0 too
    return torch.zeros(()) if tangent is None else tangent


@pytest.mark.parametrize(
    "way", ["func.jvp", "linearize", "jacfwd", "dual", "dual leaf", "no_grad dual", "no_grad dual leaf"]
)
def test_forward_mode(way):
    """CALLS // 6 of each; a linearize is traced anew for two seconds, and so comes up ten times less often."""
    for seed in range(CALLS // (60 if way == "linearize" else 6) + 1):
        # a tangent is one number: in half precision its error is that of the sum's largest parts
        call = Call(seed, dtypes=(torch.float64, torch.float32))
        names = call.draw.sample(call.leaves, call.draw.randint(1, len(call.leaves)))
        g = torch.Generator().manual_seed(seed)
        tangents = [torch.randn(call.case[n].shape, generator=g, dtype=torch.float64).to(call.dtype) for n in names]
        found = jvp_of(call, call.backend, way, names, tangents)
        expected = jvp_of(call, "reference", way, names, tangents)
        few = 64 * torch.finfo(call.dtype).eps
        torch.testing.assert_close(found.double(), expected.double(), rtol=few, atol=few, msg=f"seed {seed}")


def batched(call: Call, names: list[str], size: int) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """`size` samples of the named inputs, in front or behind."""
    g = torch.Generator().manual_seed(size)
    stacked, dims = {}, {}
    for name in names:
        x = call.case[name]
        more = [x, *(x + torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for _ in range(size - 1))]
        dims[name] = call.draw.choice([0, x.dim()])
        stacked[name] = torch.stack(more, dims[name])
    return stacked, dims


@pytest.mark.parametrize("what", ["loss", "grad", "grad_and_value", "vjp", "is_grads_batched"])
def test_vmap(what):
    """CALLS // 5 of each."""
    for seed in range(CALLS // 5 + 1):
        call = Call(seed + 10_000, dtypes=(torch.float64, torch.float32))
        names = call.draw.sample(call.leaves, call.draw.randint(1, len(call.leaves)))
        size, chunk = call.draw.randint(1, 4), call.draw.choice([None, 1, 2])
        stacked, dims = batched(call, names, size)

        def ask(backend, call=call, names=names, stacked=stacked, dims=dims, size=size, chunk=chunk):
            wide = backend == "reference"
            samples = tuple(stacked[n].double() if wide else stacked[n] for n in names)
            function, places = call.function(backend, names), tuple(range(len(names)))
            if what == "is_grads_batched":
                leaves = [x.detach().clone().requires_grad_() for x in call.inputs(backend, names)]
                factors = torch.arange(size, dtype=torch.float64 if wide else call.dtype) - 1
                loss = function(*leaves)
                if not loss.requires_grad:
                    return [torch.zeros(())] * len(leaves)
                found = torch.autograd.grad(
                    loss, leaves, factors.to(loss.dtype), is_grads_batched=True, allow_unused=True
                )
                return [torch.zeros(()) if x is None else x for x in found]
            if what == "vjp":
                function = vjp_of(function)
            elif what != "loss":
                inner = getattr(torch.func, what)(function, argnums=places)
                function = inner if what == "grad" else lambda *x: (lambda g, v: (*g, v))(*inner(*x))
            return torch.func.vmap(function, in_dims=tuple(dims[n] for n in names), chunk_size=chunk)(*samples)

        found, expected = ask(call.backend), ask("reference")
        if what == "is_grads_batched":
            # what no term reads is None for one, exact zeros for another
            found = [x if x.any() else torch.zeros_like(y) for x, y in zip(found, expected, strict=True)]
            expected = [y if y.any() else torch.zeros_like(x) for x, y in zip(found, expected, strict=True)]
        call.compare(found, expected, f"seed {seed}: {what} of {names}")


def vjp_of(function):
    return lambda *x: torch.func.vjp(function, *x)[1](torch.ones((), dtype=function(*x).dtype))


@pytest.mark.parametrize("hard_mode", ["episode", "cell", "none"])
@pytest.mark.parametrize("alone", [True, False], ids=["cross-entropy", "efe"])
def test_compile(alone, hard_mode):
    """One graph for a sixth of the calls, whose floats, sizes and layouts change all the time."""
    torch._dynamo.reset()
    compilations = []

    def count(graph, inputs):
        compilations.append(1)
        return graph

    def step(plan, target, weight, floor, ce, backend="auto"):
        if alone:
            out = qf.hard_cell_cross_entropy(plan[:, 0], target, class_weight=weight, hard_floor=floor,
                                             hard_mode=hard_mode, backend=backend)  # fmt: skip
        else:
            out = qf.efe_loss(plan, target, back_logits=plan.flip(0), class_weight=weight, hard_floor=floor,
                              hard_mode=hard_mode, weights=qf.EFEWeights(ce=ce), backend=backend)  # fmt: skip
        return ce * out.loss if alone else out.loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for seed in range(CALLS // 6 + 1):
        draw = random.Random(seed)
        case = make_case(
            B=draw.randint(2, 5), T=draw.randint(2, 4), C=5, H=draw.randint(2, 6), W=draw.randint(2, 6), seed=seed
        )
        plan = case["plan_logits"].requires_grad_()
        if draw.random() < 0.3:
            plan = plan.detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_()
        given = plan, case["target"], case["class_weight"], draw.random(), 0.1 + draw.random()
        found, expected = compiled(*given), step(*given, "reference")
        (grad,), (right,) = (torch.autograd.grad(x, plan) for x in (found, expected))
        assert_agrees(found.detach(), expected.detach(), torch.float64, f"seed {seed}: loss")
        assert_agrees(grad, right, torch.float64, f"seed {seed}: gradient")
    assert len(compilations) <= 6, f"{len(compilations)} compilations"
