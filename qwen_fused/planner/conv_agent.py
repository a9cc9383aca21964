"""The agent of runs before 0.3, so that those still resume, evaluate and report.

Its cells see their 3x3 neighbours, the means of their row and column, and the largest of the whole grid. Everything
else, and the axes, as in `qwen_fused.planner.agent`; the order of operations is that of the runs, which resume bitwise.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qwen_fused.arc.episodes import COLORS
from qwen_fused.planner.agent import VIEWS, Plan, SizeHead, describe_cells, extent_mask


class ChannelNorm(nn.Module):
    """RMS norm over the channels of [B, F, H, W], each cell by itself, so that padding never enters."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


class ConvCore(nn.Module):
    """One planning step: local 3x3 view, row / column / whole-grid context, FiLM by the prompt, residual update."""

    def __init__(self, channels: int, prompt_dim: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.local = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.context = nn.Linear(2 * channels, 2 * channels)
        self.film = nn.Linear(prompt_dim, 4 * channels)
        self.update = nn.Conv2d(2 * channels, channels, 1)
        nn.init.normal_(self.update.weight, std=0.3 / channels**0.5)

    def condition(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [B, 2F, 1, 1] that the prompt asks for; the same at every step."""
        scale, shift = self.film(prompt)[..., None, None].chunk(2, dim=1)
        return scale, shift

    def forward(self, state: Tensor, alive: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(state) * alive
        rows, columns = alive.sum(3, keepdim=True).clamp(min=1), alive.sum(2, keepdim=True).clamp(min=1)
        row, column = x.sum(3, keepdim=True) / rows, x.sum(2, keepdim=True) / columns  # [B, F, H, 1], [B, F, 1, W]
        # a dead cell's zero must not win over living cells that are all negative
        whole = x.masked_fill(alive == 0, -torch.inf).amax((2, 3), keepdim=True)  # [B, F, 1, 1]
        weight_line, weight_whole = self.context.weight.chunk(2, dim=1)
        h = self.local(x)
        h = h + F.conv2d(row, weight_line[..., None, None]) + F.conv2d(column, weight_line[..., None, None])
        h = h + F.conv2d(whole, weight_whole[..., None, None], self.context.bias)
        h = F.gelu(h * (1 + scale) + shift)
        return state + self.update(h) * alive


class ConvAgent(nn.Module):
    """Plans T steps from a query grid to its answer under a prompt, and predicts the answer's size.

    Args:
        channels: state width F.
        prompt_dim: prompt width D.
        steps: planning steps T.
    """

    def __init__(self, *, channels: int = 64, prompt_dim: int = 256, steps: int = 5):
        super().__init__()
        self.steps = steps
        views = len(VIEWS)
        self.encode = nn.Conv2d(views * COLORS + 2 + 4, channels, 1)
        self.direction = nn.Parameter(torch.randn(2, channels) * 0.1)
        self.core = ConvCore(channels, prompt_dim)
        self.readout_norm = ChannelNorm(channels)
        self.readout = nn.Conv2d(channels, COLORS + views, 1)
        self.view_preference = nn.Linear(prompt_dim, views)
        self.copy_scale = nn.Parameter(torch.tensor(4.0))
        self.size_head = SizeHead(prompt_dim)

    def start(self, source: Tensor, source_size: Tensor, size: Tensor, direction: int) -> tuple[Tensor, ...]:
        """Initial state [B, F, H, W], its mask of living cells [B, 1, H, W] and the copies [B, K, C, P]."""
        cells = describe_cells(source, source_size, size)
        alive = cells.alive.unsqueeze(1)
        # a copy even where `contiguous` would make none: strides choose the convolution, and so its last bits
        inputs = cells.inputs.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        state = (self.encode(inputs) + self.direction[direction].view(1, -1, 1, 1)) * alive
        return state, alive, cells.copies.flatten(3)

    def read(self, state: Tensor, prompt: Tensor, copies: Tensor) -> Tensor:
        """Logits [B, C, H, W] of one step: free logits plus a gated copy of the source's views."""
        free, gate = self.readout(self.readout_norm(state)).split([COLORS, copies.shape[1]], dim=1)
        gate = (gate + self.view_preference(prompt)[..., None, None]).softmax(1).flatten(2)  # [B, K, P]
        copied = torch.einsum("bkp,bkcp->bcp", gate, copies.to(gate.dtype)).unflatten(2, state.shape[2:])
        return free + self.copy_scale * copied

    def forward(
        self,
        prompt: Tensor,
        query: Tensor,
        query_size: Tensor,
        size: Tensor,
        *,
        target: Tensor | None = None,
        readouts: int | None = None,
    ) -> Plan:
        """Plan forward, and backward too when the target is given: arguments and result are those of `GridAgent`."""
        batch = prompt.shape[0]
        state, alive, copies = self.start(query, query_size, size, 0)
        if target is not None:
            back = self.start(target, size, query_size, 1)
            state, alive, copies = (torch.cat(x) for x in zip((state, alive, copies), back, strict=True))
            prompt = torch.cat([prompt, prompt])
        scale, shift = self.core.condition(prompt)
        first = self.steps - (readouts or self.steps)
        logits = []
        for step in range(self.steps):
            state = self.core(state, alive, scale, shift)
            if step >= first:
                logits.append(self.read(state, prompt, copies))
        stacked = torch.stack(logits, 1)
        inside = extent_mask(size, *query.shape[1:]).unsqueeze(1).to(state.dtype)
        pooled = (state[:batch] * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        if target is None:
            return Plan(stacked, None, None, pooled)
        # one more step backwards reaches the input itself; its first emission stands beside step T, its last beside 1
        state = self.core(state[batch:], alive[batch:], scale[batch:], shift[batch:])
        back_input = self.read(state, prompt[batch:], copies[batch:])
        return Plan(stacked[:batch], stacked[batch:].flip(1), back_input, pooled)
