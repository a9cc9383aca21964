"""Take one step as the caller's loop does, look at what it did, and put everything back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof import modes
from qwen_fused.proof.changed_gradients import noise_of_step
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.enlarged import Change, longer_alone
from qwen_fused.proof.first_order import FirstOrder, measure
from qwen_fused.proof.kinds import written_by
from qwen_fused.proof.moves import has_nonzero, scales_of
from qwen_fused.proof.optimizers import has_stepped, innermost, rate_of, rate_to_come, watching_steps
from qwen_fused.proof.projected import is_projected
from qwen_fused.proof.real_parts import inner, norm
from qwen_fused.proof.subject import Gradients, Subject, as_float
from qwen_fused.proof.trusted_ops import Linearized

HALF_PRECISION = (torch.float16, torch.bfloat16)
# calls of the given step in which an optimizer may step, of micro-batches that are added up
MOST_CALLS = 16
# a change of the gradients that is the loss's scale taken off, and one that is a clip
SAME_FACTOR = 0.02


@dataclass
class Step:
    """What one step did.

    Args:
        stepped: whether any optimizer's step was called.
        missing: names whose gradient was gone, or all zero, when the optimizer came to use it.
        changed: names whose gradient pointed another way by then than backward had left it.
        projected: name -> share of its length that is left of a gradient which something projected: a mask, a mean that
            was taken off.
        norm_ratio: norm of the gradient that the optimizer uses over that of the loss's own, of a loss that was scaled
            up for backward.
        enlarged: name -> factor of gradients that are longer by then than backward had left them, while others are not.
        factors: what the gradients were multiplied by on the way to the optimizer, in order.
        unmoved: names that did not move, though their gradient is more than the rounding of the others.
        master_only: names that rounded back to what they were, while the float32 master in the optimizer's state moved.
        moved: share of the elements that moved, among the parameters that have a gradient.
        first_order: the loss's change beside what its gradient says.
        rates: name -> learning rate of its group, None where the optimizer finds its own.
        warming_up: names whose learning rate a scheduler keeps at 0 for now; the step was taken at the rate to come.
        had_state: whether the optimizer had stepped before.
        in_backward: whether the optimizer stepped while backward was going on.
        noisy: whether what changed the gradients before the optimizer used them is noise that was added.
        repeats: whether the loss was the same, bit for bit, when it was computed again where the step began.
    """

    stepped: bool = False
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    projected: dict[str, float] = field(default_factory=dict)
    norm_ratio: float = 0.0
    enlarged: dict[str, float] = field(default_factory=dict)
    factors: list[float] = field(default_factory=list)
    unmoved: tuple[str, ...] = ()
    master_only: tuple[str, ...] = ()
    moved: float = 0.0
    first_order: FirstOrder = field(default_factory=FirstOrder)
    rates: dict[str, float | None] = field(default_factory=dict)
    warming_up: tuple[str, ...] = ()
    had_state: bool = False
    in_backward: bool = False
    noisy: bool = False
    repeats: bool = False


def take_step(subject: Subject, gradients: Gradients, loss: Any, trace: Trace, linearized: Linearized) -> Step | None:
    """Step as the caller does, with the gradients in place, look, and put parameters and optimizers back.

    Args:
        subject: what is proved.
        gradients: of the loss, still in the parameters' `.grad`.
        loss: at the parameters as they are.
        trace: the call that the gradients are of.
        linearized: its operations that are taken at their word.
    """
    if not subject.optimizers or not gradients.of or gradients.error is not None:
        return None
    inside = [innermost(optimizer) for optimizer in subject.optimizers]
    step = Step(stepped=gradients.stepped, in_backward=gradients.stepped)
    step.had_state = any(getattr(optimizer, "state", None) for optimizer in inside) and not gradients.stepped
    alive = [name for name, g in gradients.of.items() if has_nonzero(g)]
    before = subject.snapshot.values_of(subject.named)
    masters = {name: master.clone() for name, master in masters_of(subject).items()}
    if gradients.erased:
        # taken away by a hook that may keep them for the step: what was called since has made it forget
        subject.gradients(subject.call())
    with _after_warm_up(subject, step, gradients):
        _step_watched(subject, step, gradients, alive)
    subject.look_for_moving()
    counts = {name: int(torch.count_nonzero(subject.named[name].data != before[name])) for name in alive}
    # by other means than the optimizers that were given
    step.stepped = step.stepped or any(counts.values())
    measure_movement(step, counts, gradients.of, before, trace.half)
    # an optimizer may make its masters in its first step
    step.master_only = tuple(
        name
        for name, master in masters_of(subject, step.unmoved).items()
        if not torch.equal(master, masters.get(name, before[name]).to(master.dtype))
    )
    step.unmoved = tuple(name for name in step.unmoved if name not in step.master_only)
    subject.snapshot.reset_optimizers()
    subject.snapshot.clear_gradients()
    changes = {name: subject.named[name].data - before[name] for name in gradients.of}
    # what else the optimizer steps is not what is judged
    subject.snapshot.reset_values()
    step.first_order = measure(subject, gradients, changes, before, as_float(loss), trace, linearized)
    step.repeats = step.first_order.nondeterminism == 0.0
    subject.snapshot.reset_values()
    if alive and not step.in_backward and (step.changed or step.first_order.predicted > 0):
        step.noisy = noise_of_step(subject, gradients, step.changed or alive)
    return step


@contextmanager
def _after_warm_up(subject: Subject, step: Step, gradients: Gradients) -> Iterator[None]:
    """Read the learning rates, and let those that a scheduler holds at 0 for now be what they will be."""
    raised: list[tuple[dict[str, Any], Any]] = []
    names = {id(subject.named[name]): name for name in gradients.of}
    for optimizer in {id(o): o for o in map(innermost, subject.optimizers)}.values():
        # of one that has stepped before, what is at 0 now has decayed
        asleep = [group for group in optimizer.param_groups if rate_of(group) == 0 and not has_stepped(optimizer)]
        to_come = [(group, rate_to_come(optimizer, group)) for group in asleep]
        for group in optimizer.param_groups:
            step.rates |= {names[id(p)]: rate_of(group) for p in group["params"] if id(p) in names}
        for group, rate in to_come:
            if rate > 0 and not step.in_backward:
                step.warming_up += tuple(names[id(p)] for p in group["params"] if id(p) in names)
                raised.append((group, group["lr"]))
                # torch's own fused steps want a tensor where they had one
                group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    try:
        yield
    finally:
        for group, rate in raised:
            group["lr"] = rate


def _step_watched(subject: Subject, step: Step, gradients: Gradients, alive: Sequence[str]) -> None:
    """Step as the caller does, and look at the gradients when an optimizer comes to use them."""
    changes: dict[str, Change] = {}

    def look(optimizer: Any) -> None:
        first, step.stepped = not step.stepped, True
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [name for name in alive if id(subject.named[name]) in own]
        now = {name: subject.named[name].grad for name in mine}
        missing = [name for name, grad in now.items() if grad is None or not has_nonzero(grad)]
        step.missing += tuple(name for name in missing if first or name not in step.missing)
        left = {name: grad for name, grad in now.items() if grad is not None and name not in missing}
        # a fused optimizer takes the loss's scale off by itself
        taken_off = float(getattr(optimizer, "grad_scale", None) or 1.0)
        met = {name: _change(grad, gradients.to_step_by(name), taken_off) for name, grad in left.items()}
        turned = [name for name, change in met.items() if change.cosine < 0.5]
        step.projected |= {name: met[name].cosine for name in turned if is_projected(met[name], met.values())}
        step.changed += tuple(name for name in turned if name not in step.projected)
        changes.update(met)
        if left and gradients.scale > 1:
            ratio = norm(left.values()) / norm(gradients.to_step_by(name) for name in left) / taken_off
            step.norm_ratio = max(step.norm_ratio, ratio)

    if step.in_backward:
        # the gradients are used up: what is left of the step is the caller's
        subject.step()
        return
    scaled = gradients.scale != 1 and alive
    factors = modes.DispatchMode(_Factors(subject, step, gradients, alive).aten) if scaled else nullcontext()
    with watching_steps(subject.optimizers, look), factors:
        _until_stepped(subject, step)
    step.enlarged = longer_alone(changes, gradients.scale)


def _until_stepped(subject: Subject, step: Step) -> None:
    """Step, and again where it is the loop's own business at which of its calls the optimizer steps."""
    subject.step()
    for number in range(2, MOST_CALLS + 1):
        if step.stepped or subject.given_step is None:
            return
        try:
            subject.step()
        except RuntimeError:
            # a gradient scaler that has skipped the step minds being asked twice
            return
        if step.stepped:
            subject.note(f"the step that was given steps at its call number {number}")


class _Factors:
    """Follows the largest gradient from backward to the optimizer and lists what it is multiplied by on the way."""

    def __init__(self, subject: Subject, step: Step, gradients: Gradients, alive: Sequence[str]):
        self._step = step
        largest = max(alive, key=lambda name: norm([gradients.of[name]]), default=None)
        self._parameter = None if largest is None else subject.named[largest]
        self._norm = self._now()

    def _now(self) -> float:
        gradient = None if self._parameter is None else self._parameter.grad
        return 0.0 if gradient is None else norm([gradient])

    def aten(self, func: Any, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None or self._step.stepped or not self._norm:
            return out
        if any(t is gradient or t.data_ptr() == gradient.data_ptr() for t in written_by(func, args, kwargs)):
            before, self._norm = self._norm, self._now()
            if abs(self._norm / before - 1) > 1e-6:
                self._step.factors.append(self._norm / before)
        return out


def measure_movement(
    step: Step, counts: Mapping[str, int], gradients: Mapping[str, Tensor], before: Mapping[str, Tensor], half: bool
) -> None:
    """How many elements moved, and which parameters did not though their gradient is more than rounding.

    Args:
        step: is told.
        counts: name -> elements that moved, of every parameter with a gradient that is not zero.
        gradients: name -> gradient.
        before: name -> value before the step.
        half: whether anything was computed in 16 bits.
    """
    # a bias before a normalisation has a gradient of rounding noise, which need not move it
    weight = scales_of({name: before[name] for name in counts})
    shares = {name: weight[name] * norm([gradients[name]]) for name in counts}
    floor = {True: 1e-3, False: 1e-6}[half] * max(shares.values(), default=0.0)
    step.unmoved = tuple(name for name, moved in counts.items() if not moved and shares[name] > floor)
    step.moved = sum(counts.values()) / max(1, sum(before[name].numel() for name in counts))


def masters_of(subject: Subject, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Wider copies of half-precision parameters in the optimizers' state, told by their rounding: the parameter."""
    found = {}
    held = [getattr(innermost(optimizer), "state", {}) for optimizer in subject.optimizers]
    for name in subject.named if names is None else names:
        parameter = subject.named[name]
        if parameter.dtype not in HALF_PRECISION:
            continue
        states = [state[parameter] for state in held if parameter in state]
        for value in (value for state in states if isinstance(state, dict) for value in state.values()):
            if _is_wider(value, parameter) and torch.equal(value.to(parameter), parameter):
                found[name] = value
    return found


def _is_wider(value: Any, parameter: Tensor) -> bool:
    same = isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
    return same and value.dtype.itemsize > parameter.dtype.itemsize


def _change(now: Tensor, before: Tensor, taken_off: float) -> Change:
    """What became of a gradient.

    Args:
        now: when the optimizer uses it.
        before: as backward left it.
        taken_off: what the optimizer will divide it by itself.
    """
    if now.dtype == before.dtype and not now.is_sparse and torch.equal(now, before):
        return Change(1.0 / taken_off, 1.0)
    now = now.detach().to_dense() if now.is_sparse else now.detach()
    length, made, along = norm([now]), norm([before]), inner(now, before)
    if not length * made:
        return Change()
    kept = length**2 / along / taken_off if along else 0.0
    return Change(along / made**2 / taken_off, along / (length * made), length, kept)
