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

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

HALF = (torch.float16, torch.bfloat16)
MASTER = "master"

# elements of half-precision gradients that are widened at a time: 256 MiB, unless one parameter alone has more
CHUNK = 2**26


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW with a float32 master and float32 moments for every half-precision parameter.

    Float32 parameters step exactly as under `torch.optim.AdamW(fused=True)`. `found_inf` and `grad_scale` are honoured
    as there, on the device. A master is made at the first step, of the parameter as it then is; who loads other weights
    later loads the optimizer's state too, or makes a new optimizer.

    Args:
        params: parameters or groups, as for any optimizer.
        **options: of AdamW: lr, betas, eps, weight_decay, maximize.
    """

    # set by whoever steps, as `torch.amp.GradScaler` does
    found_inf: Tensor

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: called first, with gradients on; its loss is returned.
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
        states = [self._state(p) for p in members]
        gradients = [p.grad for p in members if p.grad is not None]
        beta1, beta2 = group["betas"]
        adamw(
            [state.get(MASTER, p) for p, state in zip(members, states, strict=True)],
            [gradient.float() if gradient.dtype in HALF else gradient for gradient in gradients],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        half = [(p, state[MASTER]) for p, state in zip(members, states, strict=True) if MASTER in state]
        if half:
            # a step that was skipped leaves the masters, and so their rounding, as they were
            torch._foreach_copy_([p for p, _ in half], [master for _, master in half])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            value = parameter
            if parameter.dtype in HALF:
                value = state[MASTER] = parameter.detach().float()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(value, memory_format=torch.preserve_format)
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
        # torch rounds state to its parameter's type on the way in
        for parameter, index in zip(held, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if parameter.dtype in HALF and name != "step":
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


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
