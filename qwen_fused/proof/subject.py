"""What is being proved: a loss function, its parameters, and the caller's way of sending the loss back and stepping."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof import frames, modes
from qwen_fused.proof.allowance import Allowance
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.draws import Draw
from qwen_fused.proof.gradients import Gradients, deliver
from qwen_fused.proof.ladder import name_some
from qwen_fused.proof.moves import Values
from qwen_fused.proof.optimizers import Optimizers, as_list, needs_closure
from qwen_fused.proof.replay import Held, evaluate
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.snapshot import Mark, Snapshot
from qwen_fused.proof.trace import OnCustom, trace
from qwen_fused.proof.upcast import Upcast


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
        _check_material(self.named)
        self.optimizers = as_list(optimizer)
        if step is None and any(needs_closure(one) for one in self.optimizers):
            name = next(type(one).__name__ for one in self.optimizers if needs_closure(one))
            raise ValueError(f"{name}.step needs a closure: give step=lambda: optimizer.step(closure)")
        self.allow = Allowance(allow)
        self.own_backward = backward is not None
        # how the caller's loop sends the loss back
        self.backward = backward or (lambda loss: loss.backward())
        self.given_step = step
        self.evaluations = 0
        # no faults, but worth knowing: what the rungs come across
        self.notes: list[str] = []
        left_over = [name for name, p in self.named.items() if p.grad is not None and bool(p.grad.any())]
        if left_over:
            self.notes.append(
                f"{name_some(left_over)} had a gradient before: a loop that never clears them adds them up"
            )
        # what the first call that was followed kept outside the graph, for later ones to find
        self.after_first: list[Mark] = []
        # frozen parameters that the loss function or the step moves by itself, as a momentum encoder
        self.moving: set[str] = set()
        functions = [given for given in (loss_fn, backward, step) if given is not None]
        self.snapshot = Snapshot(self.named.values(), self.modules.values(), self.optimizers, functions)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """Parameters that ask for a gradient."""
        return {name: p for name, p in self.named.items() if p.requires_grad}

    def call(
        self,
        held: Mapping[Slot, Held] | None = None,
        upcast: Upcast | None = None,
        draws: Mapping[Slot, Draw] | None = None,
    ) -> Any:
        """The loss function's result, with random generators and buffers as at the start, and held results in place."""
        self.evaluations += 1
        self.snapshot.reset()
        if not held and upcast is None:
            with modes.uncompiled():
                return frames.boundary(self.loss_fn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluate(self.loss_fn, held or {}, upcast, draws)

    def call_compiled(self) -> Any:
        """The loss function's result as the caller's loop has it: what is compiled runs compiled."""
        self.evaluations += 1
        self.snapshot.reset()
        return frames.boundary(self.loss_fn)

    def value(
        self,
        held: Mapping[Slot, Held] | None = None,
        upcast: Upcast | None = None,
        draws: Mapping[Slot, Draw] | None = None,
    ) -> float:
        """The loss as a float."""
        return as_float(self.call(held, upcast, draws))

    def evaluation(
        self, trace: Trace, held: Mapping[Slot, Held], wide: torch.dtype | None
    ) -> Callable[[Values | None], float]:
        """The loss as a function of the parameters' values, computed in a type, what is discrete as in the trace."""

        def evaluate(values: Values | None) -> float:
            upcast = None if wide is None else Upcast(wide, values or {}, trace.differentiates)
            return self.value(held, upcast, trace.draws)

        return evaluate

    def trace(self, on_custom: OnCustom | None = None, earlier: Trace | None = None) -> Trace:
        """Call the loss function and follow the parameters through it; know what an earlier call computed again."""
        self.evaluations += 1
        self.snapshot.reset()
        with warnings.catch_warnings():
            # torch points them at the proof's own lines; the plain call shows them where they belong
            warnings.simplefilter("ignore")
            known = earlier.labels if earlier is not None else None
            found = trace(self.loss_fn, self.named, on_custom, known, self.allow.function)
        if not self.after_first:
            self.after_first = self.snapshot.attributes_now()
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
        if self.given_step is not None:
            owner, name = getattr(self.given_step, "__self__", None), getattr(self.given_step, "__name__", "")
            # an optimizer's own method, got before it was watched
            own = getattr(owner, name, None) if any(owner is one for one in self.optimizers) else None
            frames.boundary(own or self.given_step)
            return
        for optimizer in self.optimizers:
            optimizer.step()

    def gradients(
        self,
        loss: Any,
        take: bool = False,
        backward: Callable[[Tensor], Any] | None = None,
        compiled: bool = False,
    ) -> Gradients:
        """Run a backward pass, the caller's by default, from cleared gradients; take down what it gave: `deliver`."""
        self.snapshot.clear_gradients()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return Gradients()
        with nullcontext() if compiled else modes.uncompiled():
            found = deliver(
                loss,
                self.trainable,
                self.named,
                backward or self.backward,
                self.snapshot.parameters,
                self.optimizers,
                take,
                watched=not compiled,
            )
        if found.stepped:
            # an optimizer that steps in the middle of backward: the step is looked at once, and undone
            self.snapshot.reset_optimizers()
        return found

    def look_for_moving(self) -> None:
        """See which frozen parameters have been moved by now, before they are put back."""
        frozen = {name: p for name, p in self.named.items() if not p.requires_grad and name not in self.moving}
        if frozen:
            before = self.snapshot.values_of(frozen)
            self.moving |= {name for name, p in frozen.items() if not torch.equal(p.data, before[name])}

    def note(self, said: str) -> None:
        """Note what is no fault, once."""
        if said not in self.notes:
            self.notes.append(said)

    def note_gradients_left(self) -> None:
        """Note what the loss function itself has put into `.grad`, an attack that calls backward say."""
        left = [name for name, p in self.named.items() if p.grad is not None and bool(p.grad.any())]
        note = f"the loss function leaves gradients in {name_some(left)}: unless they are cleared before backward, "
        note += "they are added to the loss's own"
        if left:
            self.notes.append(note)


def _check_material(named: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for parameters that hold no values yet."""
    for name, parameter in named.items():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"params: {name} has no shape yet: call the model once first")
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"params: {name} is a DTensor, which is not supported: prove it before it is sharded")
        if parameter.is_meta:
            raise ValueError(f"params: {name} is on the meta device and has no values: materialize the model first")


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
