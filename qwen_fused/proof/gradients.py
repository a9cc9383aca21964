"""Run a backward pass as the caller's loop does, and take down what each parameter was given, before it is used up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_leaves
from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.added_noise import NORMAL
from qwen_fused.proof.frames import Frame, Site
from qwen_fused.proof.labels import is_wrapped, tensors_in
from qwen_fused.proof.moves import has_nonzero
from qwen_fused.proof.optimizers import watching_steps
from qwen_fused.proof.reducers import among_processes, finish_reduction, processes


@dataclass
class Gradients:
    """What one backward pass delivered.

    Args:
        of: name -> gradient of the loss itself, whatever it was scaled by on its way back.
        left: name -> what backward left in `.grad`, where processes share their gradients and it is not this one's own,
            or a hook may have changed it; without the scale.
        own: name -> gradient as autograd had made it, of those that hooks or the given backward then changed.
        turned: hooks that turn gradients round, and whose: the lines and the names.
        draws: whether normal noise was drawn meanwhile.
        per_sample: whether gradients of single samples were taken meanwhile, by torch.func.
        allowed: whether hooks that the caller allows to had changed any.
        noisy: whether the given backward was found to add noise.
        scale: what the loss was scaled by, as a gradient scaler does.
        erased: names of gradients gone again afterwards.
        erased_at: the first place at which a gradient that had been delivered was set to None or to zeros.
        stepped: whether an optimizer stepped before backward was over.
        unregistered: leaves that the loss depends on and that are neither among the parameters nor the optimizer's.
        error: what the pass raised.
    """

    of: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    turned: list[tuple[Frame | None, tuple[str, ...]]] = field(default_factory=list)
    draws: bool = False
    per_sample: bool = False
    allowed: bool = False
    noisy: bool = False
    scale: float = 1.0
    erased: tuple[str, ...] = ()
    erased_at: Site | None = None
    stepped: bool = False
    unregistered: list[Tensor] = field(default_factory=list)
    error: RuntimeError | None = None

    def to_step_by(self, name: str) -> Tensor:
        """The gradient that an optimizer should come to use."""
        return self.left.get(name, self.of[name])

    def before_changes(self) -> dict[str, Tensor]:
        """Gradients as autograd had made them."""
        return {name: self.own.get(name, gradient) for name, gradient in self.of.items()}

    def forget(self) -> None:
        """Let the gradients themselves go, and keep whose they were."""
        self.left, self.own = {}, {}
        self.of = {name: gradient.new_zeros(()) for name, gradient in self.of.items()}


def deliver(
    loss: Tensor,
    trainable: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    backward: Callable[[Tensor], Any],
    parameters: Iterable[Tensor],
    optimizers: Iterable[Any],
    take: bool = False,
    watched: bool = True,
) -> Gradients:
    """Send the loss back.

    Args:
        loss: what `backward` is given, a tensor of its own.
        trainable: name -> parameter that asks for a gradient.
        named: name -> parameter, all of them, in the order of the result.
        backward: the caller's way.
        parameters: whose `.grad` is the caller's business to put back; other leaves' is put back here.
        optimizers: whose steps in the middle of backward are noticed.
        take: whether the gradients themselves may be kept in place of copies, as nobody writes to them afterwards.
        watched: whether calls in between are looked at, which compiled functions would be compiled anew for.
    """
    found = Gradients()
    known = {id(p) for p in parameters}
    others = [(leaf, leaf.grad) for leaf in graph_leaves(loss) if id(leaf) not in known]
    found.unregistered = [leaf for leaf, _ in others]
    for leaf, _ in others:
        leaf.grad = None
    hooks = [_hook_first(p, _keep(found, name, take)) for name, p in trainable.items()]
    seeds: list[Tensor] = []
    with torch.enable_grad():
        # a tensor of its own, so that hooks on the loss are not taken for a scale
        sent = loss.view_as(loss)
    sent.register_hook(lambda grad: seeds.append(grad.detach().double().sum()))
    watch = _Erasure(found, trainable)

    def stepped(optimizer: Any) -> None:
        found.stepped = True

    try:
        with watching_steps(optimizers, stepped), modes.FunctionMode(watch.call) if watched else nullcontext():
            frames.boundary(backward, sent)
    except RuntimeError as error:
        found.error = error
    finally:
        for hook in hooks:
            hook.remove()
        for leaf, grad in others:
            leaf.grad = grad
    for name, p in trainable.items():
        if name not in found.of and p.grad is not None:
            # put there by the caller, from autograd.grad say: no hook hears of it
            found.of[name] = p.grad.detach() if take else p.grad.detach().clone()
    if found.error is None and not found.stepped:
        finish_reduction(trainable[name] for name in found.of)
    if not found.stepped:
        found.erased = tuple(n for n in named if n in found.of and _is_gone(named[n].grad, found.of[n]))
        found.erased_at = watch.site
    if found.error is None and not found.stepped:
        shared = processes() > 1
        changed = [n for n in found.of if shared or getattr(named[n], "_post_accumulate_grad_hooks", None)]
        found.left = {n: g.detach().clone() for n in changed if (g := named[n].grad) is not None}
    found.of = {n: g.to_dense() if (g := found.of[n]).is_sparse else g for n in named if n in found.of}
    _take_scale_off(found, float(sum(seeds)))
    return found


def is_written_to(trainable: Mapping[str, Tensor]) -> bool:
    """Whether gradients may be changed once they are delivered: by hooks, or where processes share them."""
    return among_processes() or any(getattr(p, "_post_accumulate_grad_hooks", None) for p in trainable.values())


def _keep(found: Gradients, name: str, take: bool) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            # what is done to it afterwards must not reach the copy
            found.of[name] = parameter.grad.detach() if take else parameter.grad.detach().clone()

    return hook


def _hook_first(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Have a hook called once the gradient is there, before any hook that steps by it and takes it away."""
    handle = parameter.register_post_accumulate_grad_hook(hook)
    hooks = parameter._post_accumulate_grad_hooks
    others = {key: other for key, other in hooks.items() if key != handle.id}
    # read in the order of insertion, whatever an OrderedDict was told
    hooks.clear()
    hooks[handle.id] = hook
    hooks.update(others)
    return handle


class _Erasure:
    """Finds the first call during backward after which a gradient that was there is not, and what else was called."""

    def __init__(self, found: Gradients, trainable: Mapping[str, Tensor]):
        self._found = found
        self._trainable = trainable
        self.site: Site | None = None

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = kinds.name_of(func)
        self._found.draws |= name in NORMAL
        self._found.per_sample = self._found.per_sample or any(map(is_wrapped, tensors_in((args, kwargs))))
        if self.site is not None or name not in ("grad.__set__", "zero_", "_foreach_zero_") or not self._found.of:
            return func(*args, **kwargs)
        held = [n for n in self._found.of if _is_alive(self._trainable[n].grad)]
        out = func(*args, **kwargs)
        if any(not _is_alive(self._trainable[n].grad) for n in held):
            self.site = frames.locate()
        return out


def _is_alive(gradient: Tensor | None) -> bool:
    return gradient is not None and has_nonzero(gradient)


def _take_scale_off(found: Gradients, scale: float) -> None:
    # a negative factor is no scaler's: the gradient points the wrong way
    if scale == 1 or scale <= 0 or not math.isfinite(scale):
        return
    found.scale = scale
    # float32, in which a small gradient survives the loss of its scale
    found.of = _over(found.of, scale)
    found.left = _over(found.left, scale)


def _over(gradients: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {n: g.to(torch.promote_types(g.dtype, torch.float32)) / scale for n, g in gradients.items()}


def _is_gone(now: Tensor | None, delivered: Tensor) -> bool:
    return now is None or (not has_nonzero(now) and has_nonzero(delivered))
