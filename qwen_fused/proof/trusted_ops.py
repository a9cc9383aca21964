"""Custom operations, whose backward is somebody's own mathematics: checked alone, or taken at their word."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.changed_gradients import find_changes
from qwen_fused.proof.cuts import CustomOp, Trace
from qwen_fused.proof.derivative import TOLERANCE
from qwen_fused.proof.draws import Draw
from qwen_fused.proof.kinds import is_inexact
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.real_parts import inner
from qwen_fused.proof.replay import replace_tensors
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Gradients, Subject, check_scalar

Linearized = dict[Slot, "LinearizedOp"]


class LinearizedOp:
    """Stands in for a custom operation whose own backward the caller vouches for.

    At each evaluation its result is the recorded one plus what its backward says of the change of its inputs, so that
    the finite difference tests everything around it and takes the operation itself at its word.
    """

    def __init__(self, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any, draw: Draw | None = None):
        # an operation that draws has the slopes of what it drew
        self.call = call if draw is None else lambda *a, **k: draw.again(call, a, k)
        self.given = [t.detach().clone() for t in tensors_in((args, kwargs))]
        self.arguments = args, kwargs
        # what it gives without a gradient, an accuracy or a mask, is as constant as autograd takes it to be
        self.results = {place: t.detach().clone() for place, t in enumerate(tensors_in(out))}
        self.upstream: dict[int, Tensor] = {}
        self.slopes: dict[int, Tensor] = {}
        for place, tensor in enumerate(tensors_in(out)):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, place=place: self.upstream.__setitem__(place, grad.detach()))

    def finish(self) -> None:
        """Once the backward pass has been: ask the operation's backward for its slopes."""
        inputs = {
            place: tensor.clone().requires_grad_() for place, tensor in enumerate(self.given) if is_inexact(tensor)
        }
        args, kwargs = replace_tensors(self.arguments, dict(enumerate(self.given)) | inputs)
        with torch.enable_grad():
            outs = dict(enumerate(tensors_in(self.call(*args, **kwargs))))
        used = [place for place in self.upstream if outs[place].requires_grad]
        if used:
            grads = torch.autograd.grad(
                [outs[p] for p in used], list(inputs.values()), [self.upstream[p] for p in used], allow_unused=True
            )
            self.slopes = {place: g for place, g in zip(inputs, grads, strict=True) if g is not None}
        self.arguments = ((), {})

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The recorded result plus the first-order change, along the direction that the loss is sensitive to."""
        change = sum(inner(g, ins[p].detach() - self.given[p]) for p, g in self.slopes.items())
        size = sum(inner(u, u) for u in self.upstream.values())
        now = list(tensors_in(out))
        moved = {}
        for place, value in self.results.items():
            upstream = self.upstream.get(place)
            if upstream is None:
                moved[place] = value
            else:
                # in the type that is computed in now: the change is smaller than the recorded one can hold
                moved[place] = value.to(now[place].dtype) + (change / size if size else 0.0) * upstream
        return replace_tensors(out, moved)


@dataclass
class Point:
    """The loss at the parameters' present values, what following it found, and its gradients."""

    trace: Trace
    loss: Any
    gradients: Gradients
    linearized: Linearized


def differentiate(subject: Subject, earlier: Trace | None = None, take: bool = False) -> Point:
    """Follow one call of the loss function and send its loss back.

    Args:
        subject: what is proved.
        earlier: an earlier call.
        take: whether the parameters' own gradients may be kept, see `deliver`.

    Raises:
        ValueError: when it returns no scalar.
    """
    linearized: Linearized = {}

    def keep(op: CustomOp, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any) -> None:
        trusted = op.surrogate or subject.allow.custom(op.name, op.site.callers)
        if trusted or subject.allow.function(op.name):
            linearized[op.slot] = LinearizedOp(call, args, kwargs, out, op.draw)

    trace = subject.trace(keep, earlier)
    check_scalar(trace.loss)
    if earlier is None:
        subject.note_gradients_left()
    gradients = subject.gradients(trace.loss, take)
    for op in linearized.values():
        op.finish()
    find_changes(subject, gradients, bool(trace.hooks))
    loss = trace.loss
    return Point(trace, loss, gradients, linearized)


def wrong_ops(subject: Subject) -> list[tuple[CustomOp, str]]:
    """Custom operations, one call per line of source, whose backward is not the derivative of their forward."""
    calls: dict[Any, tuple[CustomOp, Callable[..., Any], Any]] = {}

    def keep(op: CustomOp, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any) -> None:
        if not op.surrogate and not subject.allow.custom(op.name, op.site.callers):
            calls.setdefault((op.name, op.site.user), (op, call, _detached((args, kwargs))))

    subject.trace(keep)
    found = []
    for op, call, (args, kwargs) in calls.values():
        ratio = _local_ratio(call, args, kwargs)
        if ratio is not None and abs(ratio - 1) > 5 * TOLERANCE[torch.float32]:
            factor = f"{ratio:.4g} times its forward's derivative"
            found.append((op, factor if math.isfinite(ratio) else "not zero though its forward is flat"))
    return found


def _detached(arguments: Any) -> Any:
    tensors = list(tensors_in(arguments))
    return replace_tensors(arguments, {place: t.detach().clone() for place, t in enumerate(tensors)})


def _local_ratio(call: Callable[..., Any], args: tuple, kwargs: dict) -> float | None:
    """Backward's over forward's derivative of one operation alone, along a random direction; None if there is none."""
    for dtype, step in ((torch.float64, 1e-5), (None, 1e-2)):
        try:
            slope, slopes = _local_slopes(call, args, kwargs, dtype, step)
        except Exception:
            # the operation insists on its own type, and says so in its own way
            continue
        measured = (4 * slopes[1] - slopes[0]) / 3
        size = max(abs(slope), abs(measured))
        if size and abs(slopes[0] - slopes[1]) <= 0.1 * size:
            return slope / measured if abs(measured) > 1e-9 * size else math.inf
    return None


def _local_slopes(
    call: Callable[..., Any], args: tuple, kwargs: dict, dtype: torch.dtype | None, step: float
) -> tuple[float, list[float]]:
    """Autograd's derivative of a random sum of the results along a random direction, and two measured ones."""
    tensors = list(tensors_in((args, kwargs)))
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    inputs = {p: t.to(dtype or t.dtype) for p, t in enumerate(tensors) if t.is_floating_point() and t.numel()}
    directions = {place: noise(t) * t.float().square().mean().sqrt().clamp(min=1e-3) for place, t in inputs.items()}
    weights: dict[int, Tensor] = {}

    def run(shift: float, with_grad: bool = False) -> tuple[Tensor, list[Tensor]]:
        moved = {p: (t + shift * directions[p]).requires_grad_(with_grad) for p, t in inputs.items()}
        given = replace_tensors((args, kwargs), {p: moved.get(p, t.clone()) for p, t in enumerate(tensors)})
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(with_grad):
            torch.manual_seed(0)
            outs = [t for t in tensors_in(call(*given[0], **given[1])) if t.is_floating_point()]
        for place, out in enumerate(outs):
            weights.setdefault(place, noise(out))
        total = sum(((weights[p] * out).sum(dtype=torch.float64) for p, out in enumerate(outs)), torch.zeros(()))
        return total, list(moved.values())

    total, leaves = run(0.0, with_grad=True)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    slope = sum(inner(g, d) for g, d in zip(grads, directions.values(), strict=True) if g is not None)
    return slope, [float((run(h)[0] - run(-h)[0]) / (2 * h)) for h in (step, step / 2)]
