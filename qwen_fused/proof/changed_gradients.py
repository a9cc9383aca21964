"""Gradients that are changed on purpose once autograd has made them, and what autograd itself had made.

A hook on a parameter that masks or scales its gradient, and a backward pass that clips every sample's gradient and adds
noise (DP-SGD), leave another gradient than the loss's own. What they do is told as a note, and the loss is compared
with the gradient that there was before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen_fused.proof.added_noise import is_added, scaled_noise
from qwen_fused.proof.frames import Frame, of_function
from qwen_fused.proof.hooks import TRIED, Hook, gradients_without, hooks_of
from qwen_fused.proof.ladder import name_some
from qwen_fused.proof.optimizers import watching_steps
from qwen_fused.proof.real_parts import inner
from qwen_fused.proof.subject import Gradients, Subject

# cosine between a gradient and what is left of it when every sample's is clipped: more than this is still its direction
CLIPPED = 0.3
# relative difference, squared, that is no rounding
DIFFERS = 1e-6


def find_changes(subject: Subject, gradients: Gradients, has_hooks: bool) -> None:
    """Put into `gradients.own` what autograd had made of those that a hook or the given backward changed.

    The `.grad` of every parameter is left as it is.

    Args:
        subject: what is proved.
        gradients: as they were delivered.
        has_hooks: whether the loss function registers hooks on tensors of its own.
    """
    if gradients.error is not None or gradients.stepped or not gradients.of:
        return
    hooked = {name: p for name, p in subject.trainable.items() if name in gradients.of and hooks_of(p)}
    with _kept(subject.named):
        if hooked:
            _before_hooks(subject, gradients, hooked)
        elif subject.own_backward and gradients.erased_at is None:
            _before_given_backward(subject, gradients)
        if has_hooks and subject.allow.matches:
            _before_allowed_hooks(subject, gradients)


def _before_allowed_hooks(subject: Subject, gradients: Gradients) -> None:
    """What there is without those hooks on the loss function's own tensors that the caller allows."""
    left_out: list[Hook] = []

    def is_allowed(_: int, hook: Hook) -> bool:
        allowed = subject.allow.hook((hook.frame, hook.site.user), hook.site.callers)
        left_out.extend([hook] * allowed)
        return allowed

    bare = gradients_without(subject, is_allowed, []).of
    changed = [n for n, g in gradients.before_changes().items() if n in bare and differ(g, bare[n])]
    if left_out and changed:
        gradients.own |= {name: bare[name] for name in changed}
        gradients.allowed = True
        subject.note(f"{left_out[0].name} changes gradients, and is allowed to: judged before it does")


def _before_hooks(subject: Subject, gradients: Gradients, hooked: Mapping[str, Tensor]) -> None:
    with _without_hooks(hooked.values()):
        bare = subject.gradients(subject.call()).of
    gradients.own = {name: bare[name] for name in hooked if name in bare and differ(gradients.of[name], bare[name])}
    after = {name: gradients.to_step_by(name) for name in hooked if name in bare}
    changed = {name: gradient for name, gradient in after.items() if differ(gradient, bare[name])}
    places: dict[Frame | None, list[str]] = {}
    for name, frame in _changing_hooks(subject, changed).items():
        places.setdefault(frame, []).append(name)
    for frame, names in places.items():
        where = "" if frame is None else f" ({frame})"
        subject.note(f"a hook{where} on {name_some(names)} changes its gradient: judged before the hook")
        if turned := tuple(name for name in names if inner(changed[name], bare[name]) < 0):
            gradients.turned.append((frame, turned))


def _changing_hooks(subject: Subject, changed: Mapping[str, Tensor]) -> dict[str, Frame | None]:
    """Where the hook is defined that changes each of the gradients, by leaving out those of one place after another."""
    places = {name: [of_function(hook) for hook in hooks_of(subject.named[name])] for name in changed}
    found = {name: frames[-1] for name, frames in places.items()}
    several = [name for name, frames in places.items() if len(set(frames)) > 1]
    left = set(several)
    for place in list(dict.fromkeys(frame for name in several for frame in places[name]))[:TRIED]:
        if not left:
            break
        parameters = [subject.named[name] for name in left]
        with _without_hooks(parameters, _defined_at(place)):
            without = subject.gradients(subject.call())
        mended = {name for name in left if name in without.of and differ(without.to_step_by(name), changed[name])}
        found |= dict.fromkeys(mended, place)
        left -= mended
    return found


def _before_given_backward(subject: Subject, gradients: Gradients) -> None:
    """What plain backward gives, where the given one is allowed to change it or adds noise to it."""
    allowed = subject.allow.given(subject.backward)
    if not (allowed or gradients.draws or gradients.per_sample):
        return
    plain = subject.gradients(subject.call(), backward=lambda loss: loss.backward()).of
    if plain.keys() != gradients.of.keys() or not any(differ(gradients.of[n], g) for n, g in plain.items()):
        return
    if allowed:
        subject.note("the backward that was given changes the gradient, and is allowed to: judged before it does")
        gradients.own = plain
        return
    runs = [_with_noise(subject, factor) for factor in (0.0, 1.0, 2.0)] if gradients.draws else []
    gradients.noisy = bool(runs) and all(is_added([run[n] for run in runs]) for n in plain)
    without = runs[0] if gradients.noisy else gradients.of
    if (gradients.noisy or gradients.per_sample) and direction(without, plain) > CLIPPED:
        gradients.own = plain
        what = "adds noise to the gradient" if gradients.noisy else "changes every sample's gradient"
        subject.note(f"the backward that was given {what}: judged by autograd's own")


def _with_noise(subject: Subject, factor: float) -> dict[str, Tensor]:
    loss = subject.call()
    with scaled_noise(factor):
        return subject.gradients(loss).of


def noise_of_step(subject: Subject, gradients: Gradients, names: Sequence[str]) -> bool:
    """Whether what changes gradients between backward and the optimizer's use of them is noise, added to them."""
    runs: list[dict[str, Tensor]] = []
    for factor in (0.0, 1.0, 2.0):
        used: dict[str, Tensor] = {}
        subject.gradients(subject.call())
        with watching_steps(subject.optimizers, _copy_into(used, subject.named)), scaled_noise(factor):
            subject.step()
        subject.snapshot.reset_values()
        subject.snapshot.reset_optimizers()
        runs.append(used)
    subject.snapshot.clear_gradients()
    if not all(name in run for run in runs for name in names):
        return False
    added = all(is_added([run[name] for run in runs]) for name in names)
    return added and direction(runs[0], {name: gradients.of[name] for name in names}) > CLIPPED


def _copy_into(used: dict[str, Tensor], named: Mapping[str, Tensor]) -> Callable[[object], None]:
    def look(optimizer: object) -> None:
        for name, parameter in named.items():
            if parameter.grad is not None:
                used.setdefault(name, parameter.grad.detach().clone())

    return look


def direction(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Cosine between two gradients of the same parameters, those of `other`."""
    pairs = [(one[name], gradient) for name, gradient in other.items()]
    size = sum(inner(a, a) for a, _ in pairs) ** 0.5 * sum(inner(b, b) for _, b in pairs) ** 0.5
    return sum(inner(a, b) for a, b in pairs) / size if size else 0.0


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients are more than rounding apart."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return False
    size = inner(other, other)
    return not inner(one - other, one - other) <= DIFFERS * size


def _defined_at(place: Frame | None) -> Callable[[Callable[..., Any]], bool]:
    return lambda hook: of_function(hook) == place


@contextmanager
def _without_hooks(
    parameters: Iterable[Tensor], is_left_out: Callable[[Callable[..., Any]], bool] = lambda hook: True
) -> Iterator[None]:
    # the registries themselves are written to: autograd holds on to them
    tables = [t for p in parameters for t in (p._backward_hooks, p._post_accumulate_grad_hooks) if t]
    held = [dict(table) for table in tables]
    for table, hooks in zip(tables, held, strict=True):
        for key in [key for key, hook in hooks.items() if is_left_out(hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, held, strict=True):
            table.clear()
            table.update(hooks)


@contextmanager
def _kept(named: Mapping[str, Tensor]) -> Iterator[None]:
    held = {name: p.grad for name, p in named.items()}
    try:
        yield
    finally:
        for name, gradient in held.items():
            named[name].grad = gradient
