"""AdamW for weights in half precision: it steps float32 masters, and the weights are their rounding.

A bfloat16 weight near 1 moves in steps of 2^-8; a learning rate of 3e-4 never moves it, however many steps there are.
Here each half-precision parameter p has a float32 master m in the optimizer's state:

    m ← AdamW(m, float32(p.grad)),  p ← round(m)

so small steps add up, and the weights are what float32 training would have, rounded once. Bytes per trained element:

                               weight   gradient   master   moments   in all
    float32                       4         4         -        8        16
    bfloat16, masters             2         2         4        8        16
    bfloat16, torch's AdamW       2         2         -        4         8   not offered: it rounds steps away
    bfloat16, LoRA                2         -         -        -         2   and 16 per element of the adapters

Half-precision weights so save activations and time, LoRA saves the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

HALF = (torch.float16, torch.bfloat16)
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST = "max_exp_avg_sq"

# elements of half-precision gradients that are widened at a time: 256 MiB, unless one parameter alone has more
CHUNK = 2**26


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW with a float32 master and float32 moments for every half-precision parameter.

    Float32 parameters step exactly as under `torch.optim.AdamW(fused=True)`. `found_inf` and `grad_scale` are honoured
    as there, on the device. A master is made at the first step, of the parameter as it then is. Weights that somebody
    writes to between two steps, to clamp them or to load others, are taken up by their masters, element by element;
    where they are written past autograd, by `.data`, nobody is told, and the master wins. A model that changes its type
    drops its masters, or has new ones, and keeps its moments. Gradients and loaded moments may lie in memory
    otherwise than their parameter: they are laid out like it, where torch's fused step would pair the wrong elements.
    To autograd a step is a write, of parameters and state.

    Args:
        params: parameters or groups, as for any optimizer.
        **options: of AdamW: lr, betas, eps, weight_decay, amsgrad, maximize. All of them may stand in a group.

    Raises:
        ValueError: an option, or a group's, that a fused AdamW does not have: foreach, differentiable, and
            decoupled_weight_decay=False.
    """

    # set by whoever steps, as `torch.amp.GradScaler` does
    found_inf: Tensor
    # for who would count a fused optimizer's writes for it
    counts_writes = True

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's, for groups with options that are stepped by.

        Args:
            param_group: params, and options that differ from the optimizer's own.

        Raises:
            ValueError: as the class.
        """
        for option, only in (("foreach", None), ("differentiable", False), ("decoupled_weight_decay", True)):
            if param_group.get(option, only) not in (only, bool(only)):
                raise ValueError(f"{option} must be {only} for a fused AdamW, got {param_group[option]!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: called first, with gradients on; its loss is returned.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for members in chunks([p for p in group["params"] if p.grad is not None]):
                self._step(members, group)
        return loss

    def _step(self, members: list[Tensor], group: Mapping[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        amsgrad, grad_scale = group["amsgrad"], getattr(self, "grad_scale", None)
        moments = (*MOMENTS, LARGEST) if amsgrad else MOMENTS
        # the version of each half-precision parameter as the last step left it; not in the state, which is saved
        left = self.__dict__.setdefault("_left", {})
        states = [self._state(p, moments) for p in members]
        for parameter, state in zip(members, states, strict=True):
            if MASTER in state and left.get(parameter) != parameter._version:
                take_up(state[MASTER], parameter)
        # the tensors that are stepped: the parameter or its master, or a copy of it without holes
        values = [without_holes(state.get(MASTER, p)) for p, state in zip(members, states, strict=True)]
        gradients = []
        for parameter, state, value in zip(members, states, values, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            if gradient.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got layout {gradient.layout} of {tuple(gradient.shape)}")
            gradients.append(laid_out_like(value, gradient.float() if gradient.dtype in HALF else gradient))
            for name in moments:
                state[name] = laid_out_like(value, state[name])
        adamw(
            values,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state[LARGEST] for state in states] if amsgrad else [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=grad_scale,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=amsgrad,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        # torch's fused step counts none of its writes; it divides the gradients by their scale too
        written = [*values, *(state[name] for state in states for name in moments)]
        torch.autograd.graph.increment_version(written + gradients if grad_scale is not None else written)
        for state, value in zip(states, values, strict=True):
            if MASTER in state:
                state[MASTER] = value
        moved = [(p, value) for p, value in zip(members, values, strict=True) if value is not p]
        if moved:
            # a step that was skipped leaves the masters, and so their rounding, as they were
            torch._foreach_copy_([p for p, _ in moved], [value for _, value in moved])
        left.update((p, p._version) for p in members if p.dtype in HALF)

    def _state(self, parameter: Tensor, moments: Sequence[str]) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            if parameter.dtype not in (*HALF, torch.float32, torch.float64):
                raise ValueError(f"parameters must be real floating point, got {parameter.dtype}")
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        if parameter.dtype not in HALF:
            # of a model that was in half precision before: its weights go on as they are
            state.pop(MASTER, None)
        elif MASTER not in state:
            state[MASTER] = parameter.detach().float()
        stepped = state.get(MASTER, parameter)
        for name in moments:
            if name not in state:
                state[name] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
            elif state[name].dtype != stepped.dtype:
                state[name] = state[name].to(stepped.dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; masters and moments keep their precision.

        Args:
            state_dict: of such an optimizer.

        Raises:
            ValueError: a half-precision parameter's state has no master: it is another optimizer's.
        """
        held = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(held, saved, strict=False):
            entries = state_dict["state"].get(index, {})
            if parameter.dtype in HALF and entries and MASTER not in entries:
                raise ValueError(
                    "optimizer state must hold a float32 master for each half-precision parameter, got one without: "
                    "it was saved by another optimizer"
                )
        super().load_state_dict(state_dict)
        self.__dict__.pop("_left", None)
        # torch rounds state to its parameter's type on the way in
        for parameter, index in zip(held, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if parameter.dtype in HALF and name != "step":
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def take_up(master: Tensor, parameter: Tensor) -> None:
    """Let the master have what of the parameter is not its rounding."""
    master.copy_(torch.where(parameter == master.to(parameter.dtype), master, parameter.to(master.dtype)))


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies in memory here; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def without_holes(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its elements are not all there is between its first and its last."""
    here = local(tensor)
    if here.is_contiguous() or torch.empty_like(here).stride() == here.stride():
        return tensor
    return tensor.clone()


def laid_out_like(model: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it with its elements in memory in the order of the model's."""
    ours, theirs = local(tensor), local(model)
    if (ours.is_contiguous() and theirs.is_contiguous()) or ours.stride() == theirs.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists whose half-precision members have at most CHUNK elements together, or are single."""
    members: list[Tensor] = []
    total = 0
    for parameter in parameters:
        count = parameter.numel() if parameter.dtype in HALF else 0
        if members and total + count > CHUNK:
            yield members
            members, total = [], 0
        members.append(parameter)
        total += count
    if members:
        yield members
