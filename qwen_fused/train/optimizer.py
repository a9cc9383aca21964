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
    so is another tensor that is put into `.data`, as `vector_to_parameters` does. Where what `.data` holds is written
    to in place, past autograd, nobody is told, and the master wins. A model that changes its type drops its masters,
    or has new ones, and keeps its moments. Gradients and loaded moments may lie in memory otherwise than their
    parameter, or have another floating type: they are laid out like it, where torch's fused step would pair the wrong
    elements. To autograd a step is a write, of parameters and state. As with torch's own, a parameter that the model
    has replaced since is stepped no more.

    Args:
        params: parameters or groups, as for any optimizer.
        **options: of AdamW: lr, betas, eps, weight_decay, amsgrad, maximize. All of them may stand in a group.

    Raises:
        ValueError: a parameter comes twice; an option, or a group's, that a fused AdamW does not have: foreach,
            differentiable, and decoupled_weight_decay=False.
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
        params = self.param_groups[-1]["params"]
        if len(set(map(id, params))) < len(params):
            # torch warns, and would step it twice
            self.param_groups.pop()
            raise ValueError("params must have each parameter once, got one that comes twice")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: called first, with gradients on; its loss is returned.

        Raises:
            ValueError: a gradient is sparse, complex or integer; or a group has no gradient, and parameters on the meta
                device, which a model that is given memory leaves behind.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            there = [p for p in group["params"] if p.grad is not None]
            if not there and any(p.is_meta and p.requires_grad for p in group["params"]):
                raise ValueError(
                    "params must have memory, got some on the meta device: make the optimizer after the model's "
                    "to_empty or load_state_dict(assign=True), which put other parameters in their place"
                )
            for members in chunks(there):
                self._step(members, group)
        return loss

    def _step(self, members: list[Tensor], group: Mapping[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        amsgrad, grad_scale = group["amsgrad"], getattr(self, "grad_scale", None)
        moments = (*MOMENTS, LARGEST) if amsgrad else MOMENTS
        # the mark of each half-precision parameter as the last step left it; not in the state, which is saved
        left = self.__dict__.setdefault("_left", {})
        states = [self._state(p, moments) for p in members]
        for parameter, state in zip(members, states, strict=True):
            if MASTER in state and (then := left.get(parameter)) != (now := mark(parameter)):
                take_up(state[MASTER], parameter, (then or now)[2])
        # the tensors that are stepped: the parameter or its master, or a copy of it without holes
        values = [without_holes(state.get(MASTER, p)) for p, state in zip(members, states, strict=True)]
        gradients = []
        for parameter, state, value in zip(members, states, values, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            if gradient.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got layout {gradient.layout} of {tuple(gradient.shape)}")
            if not gradient.is_floating_point():
                raise ValueError(
                    f"gradients must be real floating point, got {gradient.dtype} of {tuple(gradient.shape)}"
                )
            gradients.append(laid_out_like(value, gradient.to(value.dtype)))
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
        left.update((p, mark(p)) for p in members if p.dtype in HALF)

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
        """Inverse of `state_dict`; masters and moments keep their precision, and nothing is shared with what is given.

        Args:
            state_dict: of such an optimizer.

        Raises:
            ValueError: a half-precision parameter's state has no master: it is another optimizer's; a state is not
                whole, or of another shape than its parameter. Nothing is loaded then.
        """
        # hooks may put another in its place: the last before loading sees what is loaded, and the first after it is
        # done before any that looks at the result
        given: list[dict[str, Any]] = []

        def look(_: Any, final: dict[str, Any]) -> None:
            for parameter, entries in self._entries(final):
                check_state(parameter, entries)
            given.append(final)

        handles = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(lambda _: self._copy_from(given[0]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _entries(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Each parameter with its part of the state, where it has one."""
        held = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        state = state_dict["state"]
        return [(p, state[index]) for p, index in zip(held, saved, strict=False) if state.get(index)]

    def _copy_from(self, state_dict: dict[str, Any]) -> None:
        """Take the numbers anew: torch rounds them to their parameter's type on the way in, or keeps the tensors."""
        self.__dict__.pop("_left", None)
        for parameter, entries in self._entries(state_dict):
            state = self.state[parameter]
            for name, loaded in state.items():
                saved = entries[name]
                if isinstance(saved, Tensor):
                    wide = name != "step" and parameter.dtype in HALF and saved.is_floating_point()
                    state[name] = saved.to(loaded.device, torch.float32 if wide else loaded.dtype, copy=True)


def check_state(parameter: Tensor, entries: Mapping[str, Any]) -> None:
    """Raise ValueError where a step could not go on from a parameter's saved state, or would go on wrongly."""
    if parameter.dtype in HALF and MASTER not in entries:
        raise ValueError(
            "optimizer state must hold a float32 master for each half-precision parameter, got one without: "
            "it was saved by another optimizer"
        )
    for name in ("step", *MOMENTS):
        if name not in entries:
            raise ValueError(f"optimizer state must hold {name} of each parameter, got {sorted(map(str, entries))}")
    for name in (MASTER, *MOMENTS, LARGEST):
        if name in entries and entries[name].shape != parameter.shape:
            raise ValueError(
                f"optimizer state must have the shape of its parameter, {tuple(parameter.shape)}, got {name} of shape "
                f"{tuple(entries[name].shape)}: it was saved of other parameters, or of these in another order"
            )


def mark(parameter: Tensor) -> tuple[int, int, torch.dtype]:
    """What changes where somebody writes to a parameter, or gives it other memory; and its type."""
    return parameter._version, local(parameter).data_ptr(), parameter.dtype


def take_up(master: Tensor, parameter: Tensor, dtype: torch.dtype) -> None:
    """Let the master have what of the parameter is not its rounding, by way of the type that it had before."""
    rounded = master.to(dtype).to(parameter.dtype)
    master.copy_(torch.where(parameter == rounded, master, parameter.to(master.dtype)))


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
