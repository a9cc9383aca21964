"""Parameters in several groups, gradients of any strides and windows that are interrupted: hundreds of random calls.

Each is compared with float64 done by hand, or is refused in words; test_ways_in_losses.py has the losses' part.
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from torch import Tensor, nn

import qwen_fused as qf

pytestmark = pytest.mark.slow
CALLS = int(os.environ.get("QWEN_FUSED_WAYS_IN", "500"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Model(nn.Module):
    """Layers of which some share a weight, at some depth."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.ModuleList([nn.Linear(4, 4, bias=draw.random() < 0.5) for _ in range(draw.randint(1, 3))])
        self.head = nn.Linear(4, 6, bias=draw.random() < 0.5)
        if draw.random() < 0.5:
            self.head.weight = self.embed.weight
        if len(self.body) > 1 and draw.random() < 0.3:
            self.body[1].weight = self.body[0].weight
        dtype = draw.choice(DTYPES)
        for p in self.parameters():
            p.data = p.data.to(dtype)
            if draw.random() < 0.85:
                p.grad = torch.randn_like(p) * 10 ** draw.uniform(-2, 2)


def as_members(draw: random.Random, module: nn.Module):
    """A module as people hand its parameters over."""
    kind = draw.choice(["module", "parameters", "named", "list", "dict"])
    return {
        "module": lambda: module,
        "parameters": module.parameters,
        "named": module.named_parameters,
        "list": lambda: list(module.parameters()),
        "dict": lambda: {name: child for name, child in module.named_children()} or list(module.parameters()),
    }[kind]()


def test_a_parameter_in_two_groups():
    refused = counted = 0
    for seed in range(CALLS):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        model = Model(draw)
        parts = [model.embed, *model.body, model.head]
        groups: dict[str, list[nn.Module]] = {}
        for part in parts:
            groups.setdefault(draw.choice("abc"), []).append(part)
        if draw.random() < 0.2:
            groups.setdefault("b", []).append(draw.choice(parts))
        wrapped = {
            name: members[0] if len(members) == 1 else nn.ModuleList(members) for name, members in groups.items()
        }
        # by identity, in order; a module counts its own shared weights once
        seen: dict[int, str] = {}
        again, owned = False, {name: [] for name in wrapped}
        for name in wrapped:
            for p in {id(p): p for p in wrapped[name].parameters()}.values():
                if id(p) in seen:
                    again = True
                else:
                    seen[id(p)] = name
                    owned[name].append(p)
        tied = draw.choice(["refuse", "first"])
        given = {name: as_members(draw, module) for name, module in wrapped.items()}
        # a list of children counts what they share twice
        inner = any(isinstance(g, dict) for g in given.values())
        try:
            norms = qf.GroupGradNorm(given, tied=tied)
        except ValueError as error:
            assert tied == "refuse" and (again or inner) and "once" in str(error), (seed, error)
            refused += 1
            continue
        assert not again or tied == "first", f"seed {seed}: a parameter in two groups passed"
        counted += 1
        right = {name: [p.grad.double().clone() for p in owned[name] if p.grad is not None] for name in owned}
        scale, bound = draw.choice([1.0, 0.25]), 10 ** draw.uniform(-1, 1)
        stats = norms.measure(scale)
        norms.clip_(stats, bound)
        for k, name in enumerate(norms.groups):
            norm = scale * torch.cat([g.reshape(-1) for g in right[name]] or [torch.zeros(1).double()]).norm()
            torch.testing.assert_close(
                stats.norm[k].double(), norm, rtol=1e-6, atol=1e-12, msg=lambda m, seed=seed: f"seed {seed}: {m}"
            )
            factor = scale * min(1.0, bound / (norm.item() + 1e-6))
            left = [p.grad for p in owned[name] if p.grad is not None]
            for g, w in zip(left, right[name], strict=True):
                eps = torch.finfo(g.dtype).eps
                torch.testing.assert_close(
                    g.double(), w * factor, rtol=2 * eps + 1e-6, atol=1e-7, msg=lambda m, seed=seed: f"seed {seed}: {m}"
                )
    assert min(refused, counted) > CALLS // 20


def laid_out(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers under strides of another kind, never sharing an element."""
    kind = draw.choice(["as it is", "permuted", "sliced", "strided", "channels last", "a column"])
    if kind == "permuted" and x.dim() > 1:
        order = draw.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(k) for k in range(x.dim())])
    if kind == "sliced":
        axis = draw.randint(0, x.dim())
        return torch.stack([torch.full_like(x, 7.0), x], axis).select(axis, 1)
    if kind == "strided" and x.dim():
        return x.repeat_interleave(3, -1)[..., ::3]
    if kind == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "a column" and x.dim():
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x.clone()


def shape_of(draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.choice([1, 2, 3, 5]) for _ in range(draw.choice([0, 1, 2, 2, 3, 4, 4])))


def test_strides_of_gradients_and_parameters():
    """measure, clip_ and the optimizer, against AdamW in float64 on copies in order."""
    for seed in range(CALLS):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        weights = [torch.randn(shape_of(draw), dtype=torch.float64) for _ in range(draw.randint(1, 4))]
        ours = [nn.Parameter(laid_out(draw, w.to(draw.choice(DTYPES)))) for w in weights]
        wide = [nn.Parameter(p.detach().double().contiguous().clone()) for p in ours]
        options = {"lr": 0.01, "weight_decay": draw.choice([0.0, 0.1]), "amsgrad": draw.random() < 0.3}
        optimizer, right = qf.MasterAdamW(ours, **options), torch.optim.AdamW(wide, foreach=False, **options)
        norms = qf.GroupGradNorm({"all": ours})
        bound = 10 ** draw.uniform(-1, 1)
        for step in range(3):
            for p, w in zip(ours, wide, strict=True):
                g = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
                p.grad, w.grad = laid_out(draw, g.clone()), g.double().clone()
            norm = torch.nn.utils.get_total_norm([w.grad for w in wide])
            stats = norms.measure()
            torch.testing.assert_close(
                stats.norm[0].double(), norm, rtol=1e-6, atol=0, msg=lambda m, seed=seed: f"seed {seed}: {m}"
            )
            norms.clip_(stats, bound)
            factor = min(1.0, bound / (norm.item() + 1e-6))
            for p, w in zip(ours, wide, strict=True):
                eps = torch.finfo(p.dtype).eps
                torch.testing.assert_close(
                    p.grad.double(), w.grad * factor, rtol=eps + 1e-6, atol=1e-7, msg=f"seed {seed}: clip_"
                )
                # each steps by the gradient that it has: rounding is the clip's, above
                w.grad = p.grad.double().clone(memory_format=torch.contiguous_format)
            optimizer.step()
            right.step()
            for p, w in zip(ours, wide, strict=True):
                eps = torch.finfo(p.dtype).eps
                torch.testing.assert_close(
                    p.detach().double(), w.detach(), rtol=eps + 1e-5, atol=1e-6, msg=f"seed {seed}, step {step}"
                )


class Interrupt(KeyboardInterrupt):
    """Not an Exception, as Ctrl-C is none."""


def interrupt(seed: int) -> bool:
    """One window whose flush is stopped; whether the next flush was refused."""
    refused = False
    torch.manual_seed(seed)
    draw = random.Random(seed)
    dtype = draw.choice([torch.float64, torch.float32])
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3), nn.Dropout(draw.choice([0.0, 0.5]))).to(dtype)
    kind = draw.choice([torch.OutOfMemoryError, Interrupt, RuntimeError])
    at = {"calls": 0, "fail": -1, "backward": draw.random() < 0.5}

    def encode(keys):
        at["calls"] += 1
        failing = at["calls"] == at["fail"]
        out = model(torch.tensor(keys))
        if failing and at["backward"] and out.requires_grad:
            out.register_hook(lambda g: (_ for _ in ()).throw(kind("in backward")))
        elif failing:
            raise kind("in encode")
        return out

    mode, size = draw.choice(["recompute", "retain"]), draw.randint(1, 4)
    window = qf.PromptWindow(encode, size=size, mode=mode)

    def fill():
        """A window's batches; what its gradient must be, through the prompts as they were handed out."""
        for _ in range(draw.randint(1, size)):
            keys = [draw.randrange(8) for _ in range(draw.randint(1, 4))]
            prompts = window.prompts(keys)
            (prompts * torch.randn(prompts.shape).to(prompts.dtype)).sum().backward()

    def right():
        """By hand: each call of encode again under its random state, with its keys' summed gradient."""
        twin = copy.deepcopy(model).double().requires_grad_()
        keys, total = list(window.rows), window._gradient().double()
        for chunk in window.chunks:
            rows = slice(chunk.start, chunk.start + len(chunk.output))
            with chunk.random.again():
                # dropout in the type that it fell in
                mask = model[2](torch.ones(len(keys[rows]), 3, dtype=dtype))
            (twin[1](twin[0](torch.tensor(keys[rows]))) * mask.double()).backward(total[rows])
        return [p.grad for p in twin.parameters()]

    fill()
    expected = right()
    at["fail"] = at["calls"] + draw.randint(1, len(window.chunks)) if mode == "recompute" else -1
    if mode == "retain":
        draw.choice(window.chunks).output.register_hook(lambda g: (_ for _ in ()).throw(kind("in backward")))
    with pytest.raises(kind):
        window.flush()
    at["fail"] = -1
    try:
        window.flush()
    except RuntimeError as error:
        assert mode == "retain" or "stopped half way" in str(error), (seed, error)
        refused = True
        model.zero_grad()
        window.discard()
        fill()
        expected = right()
        window.flush()
    for p, w in zip(model.parameters(), expected, strict=True):
        few = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            p.grad.double(),
            torch.zeros_like(w) if w is None else w,
            rtol=few,
            atol=few,
            msg=lambda m: f"seed {seed}: {m}",
        )
    return refused


def test_an_interrupted_flush():
    """By an error of encode's or of its backward, or by Ctrl-C; then again, and again after discard."""
    refused = sum(interrupt(seed) for seed in range(CALLS))
    assert CALLS // 20 < refused < CALLS
