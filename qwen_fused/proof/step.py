"""Take one step as the caller's loop does, look at what it did, and put everything back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.derivative import scales_of
from qwen_fused.proof.replay import ReplayMismatch
from qwen_fused.proof.subject import Gradients, Subject, as_float

HALF_PRECISION = (torch.float16, torch.bfloat16)
# parts of the step at which first order is looked for, and how closely it must hold
FRACTIONS = (1.0, 1 / 16, 1 / 256)
CLOSE = (0.5, 2.0)


@dataclass
class Step:
    """What one step did.

    Args:
        stepped: whether any optimizer's step was called.
        missing: names whose gradient was gone, or all zero, when the optimizer came to use it.
        changed: names whose gradient pointed another way by then than backward had left it.
        norm_ratio: norm of the gradient that the optimizer uses over that of the loss's own gradient.
        unmoved: names that did not move, though their gradient is more than the rounding of the others.
        master_only: names that rounded back to what they were, while the float32 master in the optimizer's state moved.
        moved: share of the elements that moved, among the parameters that have a gradient.
        predicted: <g, change of the parameters>, the loss's change to first order.
        actual: the loss's change.
        fraction: largest part of the step whose change of the loss is near first order; 0 when none is; None when that
            can't be told (16-bit parameters, changes lost in rounding).
        ratio: actual over predicted change at the smallest part looked at.
        rates: name -> learning rate of its group.
        scheduled_zero: names whose learning rate a scheduler keeps at 0 for now.
        had_state: whether the optimizer had stepped before.
        nondeterminism: by how much the loss differs between two calls that should be the same.
    """

    stepped: bool = False
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    norm_ratio: float = 0.0
    unmoved: tuple[str, ...] = ()
    master_only: tuple[str, ...] = ()
    moved: float = 0.0
    predicted: float = 0.0
    actual: float = 0.0
    fraction: float | None = None
    ratio: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)
    scheduled_zero: tuple[str, ...] = ()
    had_state: bool = False
    nondeterminism: float = 0.0


def take_step(subject: Subject, gradients: Gradients, loss: Any, trace: Trace) -> Step | None:
    """Step as the caller does, with the gradients in place, look, and put parameters and optimizers back.

    Args:
        subject: what is proved.
        gradients: of the loss, still in the parameters' `.grad`.
        loss: at the parameters as they are.
        trace: a call with the same parameters.
    """
    if not subject.optimizers or not gradients.of:
        return None
    step = Step(had_state=any(optimizer.state for optimizer in subject.optimizers))
    _read_rates(subject, step, gradients)
    alive = [name for name, g in gradients.of.items() if g.any()]
    before = {name: subject.named[name].data.clone() for name in gradients.of}
    masters = {name: master.clone() for name, master in _masters(subject).items()}
    _step_watched(subject, step, gradients, alive)
    changes = {name: subject.named[name].data - old for name, old in before.items()}
    _measure_movement(subject, step, gradients, alive, before, changes, trace.half)
    # an optimizer may make its masters in its first step
    step.master_only = tuple(
        name
        for name, master in _masters(subject, step.unmoved).items()
        if not torch.equal(master, masters.get(name, before[name]).to(master.dtype))
    )
    step.unmoved = tuple(name for name in step.unmoved if name not in step.master_only)
    step.predicted = sum(float((gradients.of[n].double() * changes[n].double()).sum()) for n in alive)
    step.actual = subject.value() - as_float(loss)
    step.nondeterminism = abs(as_float(trace.loss) - as_float(loss))
    _first_order(subject, step, before, changes, as_float(loss), trace)
    subject.snapshot.reset_values()
    subject.snapshot.reset_optimizers()
    return step


def _read_rates(subject: Subject, step: Step, gradients: Gradients) -> None:
    """Learning rates of the parameters' groups, and which of them a scheduler keeps at 0 for now."""
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    rates = {id(p): (float(g["lr"]), float(g.get("initial_lr", 0.0))) for g in groups for p in g["params"]}
    known = {name: rates[id(subject.named[name])] for name in gradients.of if id(subject.named[name]) in rates}
    step.rates = {name: rate for name, (rate, _) in known.items()}
    step.scheduled_zero = tuple(name for name, (rate, initial) in known.items() if rate == 0 and initial > 0)


def _step_watched(subject: Subject, step: Step, gradients: Gradients, alive: Sequence[str]) -> None:
    """Step as the caller does, and look at the gradients when an optimizer comes to use them."""

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step.stepped = True
        now = {name: subject.named[name].grad for name in alive}
        step.missing = tuple(name for name, grad in now.items() if grad is None or not grad.any())
        left = {name: grad for name, grad in now.items() if grad is not None and name not in step.missing}
        step.changed = tuple(name for name, grad in left.items() if _cosine(grad, gradients.of[name]) < 0.5)
        # a fused optimizer takes the loss's scale off by itself
        taken_off = float(getattr(optimizer, "grad_scale", None) or 1.0)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [name for name in left if id(subject.named[name]) in own]
        if mine:
            ratio = _norm(left[name] for name in mine) / _norm(gradients.of[name] for name in mine) / taken_off
            step.norm_ratio = max(step.norm_ratio, ratio)

    hooks = [optimizer.register_step_pre_hook(look) for optimizer in subject.optimizers]
    try:
        subject.step()
    finally:
        for hook in hooks:
            hook.remove()


def _measure_movement(
    subject: Subject,
    step: Step,
    gradients: Gradients,
    alive: Sequence[str],
    before: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    half: bool,
) -> None:
    """How many elements moved, and which parameters did not though their gradient is more than rounding."""
    counts = {name: int(change.count_nonzero()) for name, change in changes.items()}
    # a bias before a normalisation has a gradient of rounding noise, which need not move it
    weight = scales_of({name: before[name] for name in alive})
    shares = {name: weight[name] * float(gradients.of[name].float().norm()) for name in alive}
    floor = {True: 1e-3, False: 1e-6}[half] * max(shares.values(), default=0.0)
    step.unmoved = tuple(name for name in alive if not counts[name] and shares[name] > floor)
    step.moved = sum(counts[name] for name in alive) / max(1, sum(changes[name].numel() for name in alive))


def _masters(subject: Subject, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Wider copies of half-precision parameters in the optimizers' state, told by their rounding: the parameter."""
    found = {}
    for name in subject.named if names is None else names:
        parameter = subject.named[name]
        if parameter.dtype not in HALF_PRECISION:
            continue
        states = (optimizer.state[parameter] for optimizer in subject.optimizers if parameter in optimizer.state)
        for value in (value for state in states for value in state.values()):
            if (
                parameter.dtype in HALF_PRECISION
                and _is_wider(value, parameter)
                and torch.equal(value.to(parameter), parameter)
            ):
                found[name] = value
    return found


def _is_wider(value: Any, parameter: Tensor) -> bool:
    same = isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
    return same and value.dtype.itemsize > parameter.dtype.itemsize


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([t.detach().to_dense().double().norm().cpu() for t in tensors]).norm())


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().to_dense().double(), other.double()
    return float((one * other).sum() / (one.norm() * other.norm()))


def _first_order(
    subject: Subject, step: Step, before: Mapping[str, Tensor], changes: Mapping[str, Tensor], loss: float, trace: Trace
) -> None:
    """Find the largest part of the step along which the loss changes as its gradient says."""
    if any(subject.allow.custom(op.name, op.site.callers) for op in trace.custom):
        # what an operation taken at its word does inside, a hard mask say, may jump along the step and can't be held
        return
    held = trace.held(carried=subject.own_backward)
    rounded = any(change.dtype in HALF_PRECISION for change in changes.values()) or trace.half
    for fraction in FRACTIONS:
        predicted = fraction * step.predicted
        told_apart = 100 * torch.finfo(torch.float32).eps * abs(loss) + 20 * step.nondeterminism
        if rounded or not abs(predicted) > told_apart:
            return
        if fraction == 1.0 and not held:
            actual = step.actual
        else:
            for name, change in changes.items():
                subject.named[name].data.copy_(before[name] + fraction * change)
            try:
                actual = subject.value(held) - loss
            except ReplayMismatch:
                return
        step.ratio = actual / predicted
        step.fraction = fraction if CLOSE[0] <= step.ratio <= CLOSE[1] else 0.0
        if step.fraction:
            return
