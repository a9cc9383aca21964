"""Optimizers as loops have them: torch's own, wrapped ones, several, with a rate or without, with a closure or not."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None


def as_list(optimizer: Any) -> list[Any]:
    """The caller's optimizers.

    Raises:
        ValueError: where one has neither parameter groups nor a step.
    """
    if optimizer is None:
        return []
    found: Sequence[Any] = [optimizer] if is_optimizer(optimizer) else _several(optimizer)
    for one in found:
        if not is_optimizer(one):
            raise ValueError(f"optimizer must be a torch optimizer or several, got {type(one).__name__}")
    return list(found)


def _several(optimizers: Any) -> list[Any]:
    if not isinstance(optimizers, Iterable):
        raise ValueError(f"optimizer must be a torch optimizer or several, got {type(optimizers).__name__}")
    return list(optimizers)


def is_optimizer(one: Any) -> bool:
    """Whether it has what every optimizer has, whether it derives from torch's or not."""
    return hasattr(one, "param_groups") and callable(getattr(one, "step", None))


def innermost(optimizer: Any) -> Any:
    """The optimizer that a wrapper (accelerate's, a scheduler's own) hands its steps to; itself where it wraps none."""
    seen = {id(optimizer)}
    while not (isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)):
        inside = [o for o in vars(optimizer).values() if is_optimizer(o) and id(o) not in seen]
        if not inside:
            break
        optimizer = inside[0]
        seen.add(id(optimizer))
    return optimizer


def needs_closure(optimizer: Any) -> bool:
    """Whether its step can't be called without a closure, as LBFGS's can't."""
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


@contextmanager
def watching_steps(optimizers: Iterable[Any], look: Callable[[Any], None]) -> Iterator[None]:
    """Call `look` with an optimizer whenever it is about to step."""
    undo: list[Callable[[], Any]] = []
    for optimizer in {id(o): o for o in map(innermost, optimizers)}.values():
        if "_optimizer_step_pre_hooks" in vars(optimizer):
            undo.append(optimizer.register_step_pre_hook(lambda one, *_: look(one)).remove)
        else:
            undo.append(_patch_step(optimizer, look))
    try:
        yield
    finally:
        for one in undo:
            one()


def _patch_step(optimizer: Any, look: Callable[[Any], None]) -> Callable[[], Any]:
    """For those that never called torch's own __init__ and so have no place for hooks."""
    own, step = vars(optimizer).get("step"), optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        look(optimizer)
        return step(*args, **kwargs)

    optimizer.step = watched
    return lambda: setattr(optimizer, "step", own) if own is not None else delattr(optimizer, "step")


def groups_of(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """Every parameter group, once."""
    inside = {id(o): o for o in map(innermost, optimizers)}.values()
    return [group for optimizer in inside for group in optimizer.param_groups]


def rate_of(group: dict[str, Any]) -> float | None:
    """A group's learning rate, None where the optimizer finds its own."""
    rate = group.get("lr")
    return None if rate is None else float(rate)


def has_stepped(optimizer: Any) -> bool:
    """Whether it has stepped before: it has state, or a scheduler that watches it was told so."""
    return bool(getattr(optimizer, "state", None)) or bool(getattr(optimizer, "_opt_called", False))


def rate_to_come(optimizer: Any, group: dict[str, Any]) -> float:
    """What a rate of 0 will be after a warm-up: as the scheduler says, or as the optimizer was made; else 0."""
    if group.get("initial_lr") is not None:
        return 0.0 if _stays_at_zero(optimizer, group) else float(group["initial_lr"])
    # a warm-up by hand holds all groups at 0; one group at 0 beside others is meant or a fault
    held = all(rate_of(other) == 0 for other in optimizer.param_groups)
    made_with = getattr(optimizer, "defaults", {}).get("lr")
    return float(made_with) if held and made_with is not None else 0.0


def _stays_at_zero(optimizer: Any, group: dict[str, Any]) -> bool:
    """Whether a schedule of the user's own functions keeps the group at 0 for as far as can be looked ahead."""
    place = next(n for n, one in enumerate(optimizer.param_groups) if one is group)
    made = [s for s in gc.get_objects() if issubclass(type(s), torch.optim.lr_scheduler.LambdaLR)]
    for schedule in (s for s in made if getattr(s, "optimizer", None) is optimizer):
        try:
            if not any(schedule.lr_lambdas[place](10**power) for power in range(7)):
                return True
        except Exception:
            # a function of the user's, which may know fewer steps
            continue
    return False


def tensors_of_state(tree: Any) -> Iterator[Tensor]:
    """Tensors in an optimizer's state, however deep."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of_state(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_of_state(value)


def copy_containers(tree: Any) -> Any:
    """Dicts and lists copied, what lies in them not."""
    if type(tree) is dict:
        return {key: copy_containers(value) for key, value in tree.items()}
    return [copy_containers(value) for value in tree] if type(tree) is list else tree
