"""The planner's recurrence: T planning steps over a grid of cells, weights tied, in one differentiable call.

One step, rows being cells, in channels-last layout:

    x = state / rms(state) * norm                                            on living cells, 0 elsewhere
    z = relu(x wz + bz)                                                      parts of c features, one of m
    a = [x | z's last m features of the nine cells around | context of z's other parts]
    h = gelu((a wc + bias) * scale + shift)                                  scale, shift: the prompt's (FiLM)
    state = state + h wu

The context of a cell is what it can see of the whole grid: the largest z on its line to either side, above and below
(running maxima, as in CompressARC), the largest anywhere, the means of its row and of its column; and where an
episode has several palettes (colours side by side, sharing weights), the mean and the largest over them.

Axes: N episodes, P palettes (1 if colours are channels), H W canvas, F state width, c and m context widths.
The op has no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qwen_fused import backends

EPSILON = 1e-6
CONTEXTS = 6
"""Parts of z of an episode with one palette."""

COMPILED = backends.has_kernel("plan_core", "cpu")


class PlanCore(nn.Module):
    """The recurrence's weights, and the prompt's say in it.

    Args:
        channels: state width F, a multiple of 4.
        prompt_dim: prompt width D.
    """

    def __init__(self, channels: int, prompt_dim: int):
        super().__init__()
        hidden, self.part = 2 * channels, channels // 4
        seen = channels + (9 + CONTEXTS + 1) * self.part
        self.norm = nn.Parameter(torch.ones(channels))
        self.look = nn.Linear(channels, (CONTEXTS + 1) * self.part)
        self.mix = nn.Parameter(torch.empty(seen, hidden).uniform_(-1, 1) * seen**-0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.film = nn.Linear(prompt_dim, 2 * hidden)
        self.update = nn.Parameter(torch.randn(hidden, channels) * 0.3 / channels**0.5)

    def forward(self, state: Tensor, alive: Tensor, prompt: Tensor, steps: int) -> Tensor:
        """States [T, N, 1, H, W, F] after each step of [N, 1, H, W, F], under prompts [N, D]."""
        scale, shift = self.film(prompt).chunk(2, dim=1)
        return plan_core(
            state, alive, 1 + scale, shift, self.norm, self.look.weight.t(), self.look.bias, self.mix, self.bias,
            self.update, self.part, steps,
        )  # fmt: skip


def plan_core(
    state: Tensor,
    alive: Tensor,
    scale: Tensor,
    shift: Tensor,
    norm: Tensor,
    wz: Tensor,
    bz: Tensor,
    wc: Tensor,
    bias: Tensor,
    wu: Tensor,
    part: int,
    steps: int,
) -> Tensor:
    """Run the recurrence.

    Args:
        state: [N, P, H, W, F] float32 or float64, 0 on dead cells.
        alive: [N, H, W] 1 on living cells, 0 on others.
        scale, shift: [N, hidden].
        norm: [F].
        wz, bz: [F, 6c + m], [6c + m]; 7c + m where P > 1.
        wc, bias: [F + 9m + 7c, hidden] (9c where P > 1), [hidden].
        wu: [hidden, F].
        part: c.
        steps: T.

    Returns:
        [T, N, P, H, W, F], the state after each step.
    """
    arguments = (state, scale, shift, norm, wz, bz, wc, bias, wu)
    fits = COMPILED and state.device.type == "cpu" and norm.dtype in (torch.float32, torch.float64)
    if fits and torch._C._functorch.maybe_current_level() is None:
        # what autocast made narrower on the way here is widened again: there is no op in half precision to gain from
        first, *others = (x.to(norm.dtype) for x in arguments)
        return torch.ops.qwen_fused.plan_core(first, alive.bool(), *others, part, steps)[0]
    return plan_core_reference(state, alive, *arguments[1:], part, steps)


def plan_core_reference(
    state: Tensor,
    alive: Tensor,
    scale: Tensor,
    shift: Tensor,
    norm: Tensor,
    wz: Tensor,
    bz: Tensor,
    wc: Tensor,
    bias: Tensor,
    wu: Tensor,
    part: int,
    steps: int,
) -> Tensor:
    """The same in plain torch, on any device, under `torch.func` too."""
    width = state.shape[-1]
    live = alive[:, None, :, :, None].to(state.dtype)
    scale, shift = scale[:, None, None, None], shift[:, None, None, None]
    rows, columns = live.sum(3, keepdim=True).clamp(min=1), live.sum(2, keepdim=True).clamp(min=1)
    # what is the same for every cell goes into the matrices and the shift: a device is busy reading and writing cells
    wz = norm[:, None] * wz
    wc = torch.cat([norm[:, None] * wc[:width], wc[width:]])
    shift = bias * scale + shift
    states = []
    for _ in range(steps):
        x = state * inverse_rms(state)
        # x is 0 on dead cells, as the state is
        z = F.relu(torch.addcmul(x @ wz, bz, live))
        a = torch.cat([x, *context(z, part, rows, columns)], -1)
        h = F.gelu(torch.addcmul(shift, a @ wc, scale))
        state = torch.addcmul(state, h @ wu, live)
        states.append(state)
    return torch.stack(states)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / the root mean square along the last axis, which stays as 1: each cell by itself, so padding never enters."""
    # one pass over x, where squares and their mean would be two
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + EPSILON)


def context(z: Tensor, part: int, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """What a cell sees of its neighbours and of the whole grid: [N, P, H, W, .] each, in the order of wc's rows.

    Args:
        z: [N, P, H, W, 6c + m], 7c + m where P > 1; at least 0.
        part: c.
        rows, columns: [N, 1, H, 1, 1] and [N, 1, 1, W, 1], living cells of each.
    """
    parts = CONTEXTS if z.shape[1] == 1 else CONTEXTS + 1
    right, left, down, up, whole, line, *across = z[..., : parts * part].split(part, -1)
    near = F.pad(z[..., parts * part :], (0, 0, 1, 1, 1, 1))
    # [N, P, H, W, m, 3, 3], the nine cells in front of their features
    around = near.unfold(2, 3, 1).unfold(3, 3, 1).movedim(4, -1).flatten(-3)
    seen = [
        around,
        right.cummax(3)[0],
        left.flip(3).cummax(3)[0].flip(3),
        down.cummax(2)[0],
        up.flip(2).cummax(2)[0].flip(2),
        whole.amax((2, 3), keepdim=True).expand_as(whole),
        (line.sum(3, keepdim=True) / rows).expand_as(line),
        (line.sum(2, keepdim=True) / columns).expand_as(line),
    ]
    for own in across:
        seen += [own.mean(1, keepdim=True).expand_as(own), own.amax(1, keepdim=True).expand_as(own)]
    return seen


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    state, alive, scale, shift, norm, wz, _, wc, _, wu, ctx.part, _ = inputs
    ctx.save_for_backward(state, alive, scale, shift, norm, wz, wc, wu, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 12
    found = torch.ops.qwen_fused.plan_core_backward(grad, *ctx.saved_tensors, ctx.part)
    d_state, *others = found
    return d_state, None, *others, None, None


def _fake(
    state: Tensor, alive: Any, scale: Any, shift: Any, norm: Any, wz: Tensor, bz: Any, wc: Tensor, bias: Any, wu: Any,
    part: int, steps: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    elements = steps * state.shape[:-1].numel() * (wz.shape[1] + wc.shape[0] + wc.shape[1])
    workspace = state.new_empty(elements, dtype=torch.int64 if state.element_size() == 8 else torch.int32)
    return state.new_empty((steps, *state.shape)), workspace


def _fake_backward(
    grad: Any, state: Tensor, alive: Any, scale: Tensor, shift: Tensor, norm: Tensor, wz: Tensor, wc: Tensor,
    wu: Tensor, *saved: Any,
) -> list[Tensor]:  # fmt: skip
    bz, bias = wz.new_empty(wz.shape[1]), wc.new_empty(wc.shape[1])
    return [torch.empty_like(x) for x in (state, scale, shift, norm, wz, bz, wc, bias, wu)]


if COMPILED:
    torch.library.register_fake("qwen_fused::plan_core", _fake)
    torch.library.register_fake("qwen_fused::plan_core_backward", _fake_backward)
    torch.library.register_autograd("qwen_fused::plan_core", _backward, setup_context=_save)
