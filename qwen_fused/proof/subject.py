"""What is being proved: a loss function, its parameters, and the caller's way of sending the loss back and stepping."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.common.autograd_graph import graph_leaves
from qwen_fused.proof import frames
from qwen_fused.proof.cuts import Event, Trace
from qwen_fused.proof.replay import Held, Slot, Upcast, evaluate
from qwen_fused.proof.snapshot import Snapshot
from qwen_fused.proof.trace import OnCustom, trace

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None


class Allowance:
    """What the caller declares to be intended, and how often each entry was needed.

    An entry is a pattern (`*` and `?`) for a parameter or module name; a function ("baseline"), a function of a file
    ("policy.py:baseline") or a line ("policy.py:41") within which an operation loses the gradient on purpose; an
    operation ("torch.no_grad", a custom Function's name) or a kind of cut ("argmax").
    """

    def __init__(self, entries: Iterable[str]):
        entries = (entries,) if isinstance(entries, str) else tuple(entries)
        for entry in entries:
            if not isinstance(entry, str):
                raise ValueError(f"allow must hold strings, got {type(entry).__name__}")
        self.matches = dict.fromkeys(entries, 0)

    def name(self, name: str) -> bool:
        """Whether a parameter or module may be left without a gradient, frozen, or in evaluation mode."""
        return self._match([name])

    def event(self, event: Event) -> bool:
        """Whether a cut is intended."""
        frames_of = [frame for frame in (event.site.user, event.site.inside, event.at) if frame is not None]
        lines = [f"{frame.file.rpartition('/')[2]}:{frame.line}" for frame in frames_of]
        return self._match([event.kind, event.operation, *lines, *_functions(event.site.callers)])

    def custom(self, name: str, callers: Iterable[str]) -> bool:
        """Whether a custom operation's own backward is to be taken at its word."""
        return self._match([name, name.rpartition("::")[2], *_functions(callers)])

    def _match(self, candidates: list[str]) -> bool:
        found = [entry for entry in self.matches if any(fnmatchcase(c, entry) for c in candidates)]
        for entry in found:
            self.matches[entry] += 1
        return bool(found)


@dataclass
class Gradients:
    """What one backward pass delivered.

    Args:
        of: name -> gradient of the loss itself, whatever it was scaled by on its way back.
        scale: what the loss was scaled by, as a gradient scaler does.
        erased: names of gradients gone again afterwards.
        error: what the pass raised.
    """

    of: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    erased: tuple[str, ...] = ()
    error: RuntimeError | None = None


class Subject:
    """The parts of a proof, and the only way in which it calls the user's code.

    Args: as `qwen_fused.proof.prove`.
    """

    def __init__(
        self,
        loss_fn: Callable[[], Any],
        params: nn.Module | Mapping[str, Any],
        optimizer: Optimizers,
        allow: Iterable[str],
        backward: Callable[[Tensor], Any] | None,
        step: Callable[[], Any] | None,
    ):
        if not callable(loss_fn):
            raise ValueError(f"loss_fn must be callable without arguments, got {type(loss_fn).__name__}")
        self.loss_fn = loss_fn
        self.source = params
        self.modules = _modules(params)
        self.named = _named(params)
        if not self.named:
            raise ValueError("params must have at least one parameter, got none")
        self.optimizers = _optimizers(optimizer)
        self.allow = Allowance(allow)
        self.own_backward = backward is not None
        # how the caller's loop sends the loss back
        self.backward = backward or (lambda loss: loss.backward())
        self._step = step
        self.evaluations = 0
        self.snapshot = Snapshot(self.named.values(), self.modules.values(), self.optimizers, loss_fn)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """Parameters that ask for a gradient."""
        return {name: p for name, p in self.named.items() if p.requires_grad}

    def call(self, held: Mapping[Slot, Held] | None = None, wide: Upcast | None = None) -> Any:
        """The loss function's result, with random generators and buffers as at the start, and held results in place."""
        self.evaluations += 1
        self.snapshot.reset()
        if not held and wide is None:
            return frames.boundary(self.loss_fn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluate(self.loss_fn, held or {}, wide)

    def value(self, held: Mapping[Slot, Held] | None = None, wide: Upcast | None = None) -> float:
        """The loss as a float."""
        return as_float(self.call(held, wide))

    def trace(self, on_custom: OnCustom | None = None, earlier: Trace | None = None) -> Trace:
        """Call the loss function and follow the parameters through it; know what an earlier call computed again."""
        self.evaluations += 1
        self.snapshot.reset()
        with warnings.catch_warnings():
            # torch points them at the proof's own lines; the plain call shows them where they belong
            warnings.simplefilter("ignore")
            found = trace(self.loss_fn, self.named, on_custom, earlier.labels if earlier is not None else None)
        # calling the modules may have given a name to another parameter
        found.named_after = {id(p): name for name, p in _named(self.source).items()}
        return found

    def watched_call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call one of the analyses that take the loss function themselves."""
        self.evaluations += 1
        self.snapshot.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(self.loss_fn, *args)

    def step(self) -> None:
        """Step as the caller's loop does."""
        if self._step is not None:
            frames.boundary(self._step)
            return
        for optimizer in self.optimizers:
            optimizer.step()

    def gradients(self, loss: Any) -> Gradients:
        """Run the backward pass from cleared gradients and take down what each parameter was given."""
        self.snapshot.clear_gradients()
        found = Gradients()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return found

        def keep(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                if parameter.grad is not None:
                    # what is done to it afterwards must not reach the copy
                    found.of[name] = parameter.grad.detach().clone()

            return hook

        # what else the loss depends on must not be left with a gradient either
        known = {id(p) for p in self.snapshot.parameters}
        others = [(leaf, leaf.grad) for leaf in graph_leaves(loss) if id(leaf) not in known]
        for leaf, _ in others:
            leaf.grad = None
        hooks = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in self.trainable.items()]
        seeds: list[Tensor] = []
        with torch.enable_grad():
            # a tensor of its own, so that hooks on the loss are not taken for a scale
            sent = loss.view_as(loss)
        sent.register_hook(lambda grad: seeds.append(grad.detach().double().sum()))
        try:
            self.backward(sent)
        except RuntimeError as error:
            found.error = error
        finally:
            for hook in hooks:
                hook.remove()
            for leaf, grad in others:
                leaf.grad = grad
        found.erased = tuple(n for n in self.named if n in found.of and _is_gone(self.named[n].grad, found.of[n]))
        found.of = {n: g.to_dense() if (g := found.of[n]).is_sparse else g for n in self.named if n in found.of}
        scale = float(sum(seeds))
        if scale != 1 and scale != 0 and math.isfinite(scale):
            found.scale = scale
            # float32, in which a small gradient survives the loss of its scale
            found.of = {n: g.to(torch.promote_types(g.dtype, torch.float32)) / scale for n, g in found.of.items()}
        return found


def as_float(loss: Any) -> float:
    """A loss of any kind as a Python float."""
    return float(loss.detach().double()) if isinstance(loss, Tensor) else float(loss)


def check_scalar(loss: Any) -> None:
    """Raise a ValueError when it is no scalar loss."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return a scalar, got a tensor of shape {tuple(loss.shape)}")
        if not loss.is_floating_point():
            raise ValueError(f"loss_fn must return a floating-point scalar, got {loss.dtype}")
    else:
        try:
            float(loss)
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss_fn must return a scalar loss, got {type(loss).__name__}") from error


def _is_gone(now: Tensor | None, delivered: Tensor) -> bool:
    return now is None or (not now.any() and bool(delivered.any()))


def _functions(callers: Iterable[str]) -> list[str]:
    """Every way to name the functions around an operation: file and function, qualified name, name."""
    names = []
    for caller in callers:
        file, _, function = caller.partition(":")
        last = function.rpartition(".")[2]
        names += [caller, function, last, f"{file}:{last}"]
    return names


def _modules(params: Any) -> dict[str, nn.Module]:
    if isinstance(params, nn.Module):
        return {"": params}
    if isinstance(params, Mapping):
        return {name: value for name, value in params.items() if isinstance(value, nn.Module)}
    return {}


def _named(params: Any) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        return dict(params.named_parameters())
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be a module or a mapping of names, got {type(params).__name__}")
    named: dict[str, Tensor] = {}
    for name, value in params.items():
        if isinstance(value, nn.Module):
            named |= {f"{name}.{inner}": p for inner, p in value.named_parameters()}
        elif isinstance(value, Tensor):
            named[name] = value
        else:
            raise ValueError(f"params[{name!r}] must be a parameter or a module, got {type(value).__name__}")
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    # a tied parameter is judged once, under its first name
    return {name: p for name, p in named.items() if first[id(p)] == name}


def _optimizers(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    if optimizer is None:
        return []
    found: Sequence[Any] = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch optimizer or several, got {type(one).__name__}")
    return list(found)


def frozen_by_peft(modules: Mapping[str, nn.Module]) -> set[int]:
    """Ids of the parameters that peft freezes by design: all of a model with adapters but its active adapters."""
    peft = sys.modules.get("peft")
    if peft is None:
        return set()
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    found: set[int] = set()
    for part in (part for module in modules.values() for part in module.modules()):
        if not getattr(part, "peft_config", None):
            continue
        layers = [layer for layer in part.modules() if isinstance(layer, kind)]
        places = {name for layer in layers for name in layer.adapter_layer_names} | {"modules_to_save"}
        active = {name for layer in layers for name in layer.active_adapters}
        for name, parameter in part.named_parameters():
            pieces = set(name.split("."))
            if not (pieces & places and pieces & active):
                found.add(id(parameter))
    return found
